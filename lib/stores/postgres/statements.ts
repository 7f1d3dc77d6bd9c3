import {
  after,
  COUNTS,
  FOUND,
  IS_AT_REST,
  IS_REPLY,
  IS_TOMBSTONE,
  IS_UNOWNED,
  isClaimed,
  isReleased,
  KIND,
  LISTED,
  NO_RECORD,
  NOTHING_MORE,
  plainlyFound,
  VERDICT,
  VERSION
} from './judging.js'
import { chore, createTable, qualified, quoted, tableDdl } from './table.js'

/*
 * The statements of a PostgresStore. Each is one atomic step under READ COMMITTED; each takes the time from the
 * server, by clock_timestamp(), because now() is the start of a transaction or of a wait for a lock.
 *
 * Whoever changes a row that another is changing waits for it, and judges it anew as it is then: so all that decides is in the
 * conditions of that change.
 *
 * A claim inside an open transaction is a row that nobody else sees; an exclusive advisory lock on the key, held by the
 * transaction, says that it is there, and lets others see so without waiting. Whoever claims without a transaction, settles or
 * deletes takes the same lock shared, for one statement.
 */

/** The channel of all wake-ups. A message is the SHA-256 of a key, in hex. */
export const CHANNEL = 'fastify-idempotency'

/** How many expired rows go in one statement. */
export const SWEEP_ROWS = 500

/** How many rows a page of the list looks at. */
export const PAGE_ROWS = 500

const NOTIFY = `pg_notify('${CHANNEL}', encode(sha256(convert_to(key, 'UTF8')), 'hex'))`

/** What a claim brings, as parameters or as literals. */
export interface ClaimValues {
  key: string
  token: string
  fingerprint: string
  leaseMs: string
  retainMs: string
  takeover: string
}

const PARAMETERS: ClaimValues = {
  key: '$1::text',
  token: '$2::text',
  fingerprint: '$3::text',
  leaseMs: '$4::float8',
  retainMs: '$5::float8',
  takeover: '$6::boolean'
}

/** The statements for one table, whose name is quoted. */
export class PostgresSql {
  /** The table, as a migration would create it. */
  readonly ddl: string
  readonly createTable: string
  /** $1 key, $2 token, $3 fingerprint, $4 leaseMs, $5 retainMs, $6 takeover. No row: ask once more. */
  readonly acquire: string
  /**
   * The same where it can be said at once: the key is free, or its record is kept, or another holds it. $1 to $5. No row, or
   * one in which nothing is found: ask by `acquire`.
   */
  readonly acquireAtOnce: string
  /** $1 key, $2 token, $3 leaseMs. A row: yes. */
  readonly renew: string
  /** $1 key, $2 token, $3 fingerprint, $4 to $9 the record, $10 ttlMs or null. A row: yes. */
  readonly complete: string
  /** The same where nobody waits. No row: ask by `complete`. */
  readonly completeUnheard: string
  /** The same for a claim of the very transaction that it runs in, which cannot have expired. */
  readonly completeInTransaction: string
  /** $1 key, $2 token, $3 how the step begins, up to its result, $4 the step. A row: yes. */
  readonly step: string
  /** $1 key, $2 token, $3 how long to remember a release, $4 whether its handler never ran. A row: yes. */
  readonly release: string
  /** $1 key. */
  readonly get: string
  /** $1 key, $2 unlessRunning. A row with `existed`. */
  readonly remove: string
  /** $1 the last key of the page before, or null, $2 kinds. A row at least, each with the `cursor`; without a key: of nothing. */
  readonly list: string
  /** $1 key, $2 a token that nobody has, $3 to $9 the record, $10 ttlMs or null, $11 the fingerprint asked for. A row: yes. */
  readonly settle: string
  /** $1 key, $2 a token that nobody has, $3 fingerprint. A row: yes. */
  readonly settleAsEnded: string
  /** $1 key. Notes that somebody waits; a row: for a claim that runs. */
  readonly watch: string
  /** $1 key. Tells those who wait for a transaction that it is over. */
  readonly wake: string
  /** Deletes some of the expired rows, a row for each, unless another process is at it. */
  readonly sweep: string
  readonly #table: string
  /** The table's name as a literal. */
  readonly #literal: string
  readonly #schema: string | null
  readonly #name: string
  readonly #elsewhere = new Map<string, PostgresSql>()

  /** @param schema `null`: wherever the search path finds the table */
  constructor(schema: string | null, name: string) {
    const table = qualified(schema, name)
    this.#schema = schema
    this.#name = name
    this.#table = table
    this.#literal = quoted(table)
    this.ddl = tableDdl(schema, name)
    this.createTable = createTable(schema, name)
    const mine = `key = $1::text AND token = $2::text AND version = ${VERSION} AND expires_at > clock_timestamp()`

    this.acquire = this.#claim('pg_try_advisory_xact_lock_shared', PARAMETERS)
    this.acquireAtOnce = this.#claimAtOnce(PARAMETERS)

    this.renew = `
UPDATE ${table} SET
  lease_end = ${after('$3::float8')},
  expires_at = ${after('($3::float8 + retain_ms)')}
WHERE ${mine} AND state = 'running'
RETURNING true`

    const record = `state = 'completed', fingerprint = $3::text, created_at = $4::numeric, status_code = $5::int, headers = $6::jsonb, body = $7::bytea,
    body_is_text = $8::boolean, tombstone = $9::text, steps = NULL,
    expires_at = coalesce(${after('$10::float8')}, 'infinity')`
    this.complete = this.#finish("state = 'completed'", mine, record)
    this.completeUnheard = `UPDATE ${table} SET ${record} WHERE ${mine} AND state = 'running' AND NOT waiting RETURNING true`
    // A row's xmin is the transaction that has written it, in 32 bits.
    const written = "key = $1::text AND token = $2::text AND xmin::text = (txid_current() & x'ffffffff'::bigint)::text"
    this.completeInTransaction = this.#finish("state = 'completed'", written, record)

    // Looked for and added in one statement: another one may add the same at this moment, and waits for the row.
    this.step = `
UPDATE ${table} SET
  steps = CASE WHEN strpos(E'\\n' || steps, E'\\n' || $3::text) > 0 THEN steps ELSE coalesce(steps, '') || $4::text END
WHERE ${mine} AND state = 'running'
RETURNING true`

    // A first attempt has found nothing. Any lease_end will do that is over on every clock.
    const unused = '$4::boolean AND found_state IS NOT NULL'
    const isNothing = 'found_state IS NULL AND steps IS NULL'
    this.release = this.#finish(
      "state IN ('released', 'ended', 'abandoned')",
      mine,
      `state = CASE WHEN ${isNothing} THEN 'released' WHEN ${unused} THEN found_state ELSE 'ended' END,
    attempt = CASE WHEN ${unused} THEN attempt - 1 ELSE attempt END,
    fingerprint = CASE WHEN ${unused} THEN found_fingerprint ELSE fingerprint END,
    lease_end = '-infinity', found_state = NULL, found_fingerprint = NULL,
    expires_at = ${after(`CASE WHEN ${isNothing} THEN $3::float8 ELSE retain_ms END`)}`
    )

    this.get = `
WITH held AS MATERIALIZED (
  ${this.#held('$1::text')}
)
SELECT ${FOUND} FROM held
UNION ALL
SELECT 'locked', NULL, ${NOTHING_MORE} WHERE NOT EXISTS (SELECT FROM held) AND ${this.#isHeld('$1::text')}`

    this.remove = `
WITH gone AS (
  DELETE FROM ${table} WHERE ${this.#unheld(`NOT $2::boolean OR ${IS_AT_REST}`)}
  RETURNING key, waiting, ${COUNTS} AS existed
)
SELECT existed, CASE WHEN waiting THEN ${NOTIFY}::text END FROM gone`

    this.list = this.#list()

    // What it took over is of no more interest: nobody will give it back.
    const nobodys = 'token = $2::text, found_state = NULL, found_fingerprint = NULL'
    const unsettled = `(${IS_UNOWNED} OR ${IS_TOMBSTONE}) AND fingerprint = $11::text AND expires_at > clock_timestamp()`
    this.settle = this.#change(`${nobodys}, ${record}`, this.#unheld(unsettled))
    this.settleAsEnded = this.#change(
      `${nobodys}, state = 'ended', lease_end = '-infinity', expires_at = ${after('retain_ms')}`,
      this.#unheld(`${IS_UNOWNED} AND fingerprint = $3::text AND expires_at > clock_timestamp()`)
    )

    this.watch = `
WITH running AS (
  UPDATE ${table} SET waiting = true
  WHERE key = $1::text AND ${isClaimed()} AND state = 'running' AND lease_end > clock_timestamp()
  RETURNING true
)
SELECT true FROM running
UNION ALL
SELECT true WHERE NOT EXISTS (SELECT FROM running) AND ${this.#isHeld('$1::text')}`

    this.wake = `SELECT ${NOTIFY} FROM (SELECT $1::text AS key) AS woken`

    // now() here, because an index cannot be searched by a time that goes on.
    this.sweep = `
WITH turn AS MATERIALIZED (
  SELECT pg_try_advisory_xact_lock(${chore('sweep', `(${this.#literal}::regclass::oid::bigint & 2147483647)::int`)}) AS mine
), doomed AS MATERIALIZED (
  SELECT old.key FROM ${table} AS old
  WHERE old.expires_at < now() AND (SELECT mine FROM turn)
  ORDER BY old.expires_at LIMIT ${SWEEP_ROWS} FOR UPDATE SKIP LOCKED
)
DELETE FROM ${table} AS old USING doomed WHERE old.key = doomed.key RETURNING true`
  }

  /** The statements for the table in a schema, whose name comes quoted where that is necessary. */
  in(schema: string): PostgresSql {
    if (this.#schema !== null) return this
    const name = schema.startsWith('"') ? schema.slice(1, -1).replaceAll('""', '"') : schema
    let there = this.#elsewhere.get(name)
    if (there === undefined) {
      there = new PostgresSql(name, this.#name)
      this.#elsewhere.set(name, there)
    }
    return there
  }

  /**
   * Begins a transaction that claims a key. The values are literals: several statements in one trip take no parameters.
   * @param savepoint What the transaction goes back to when the handler has broken it, and yet has an answer to give.
   * @param idleMs For how long the server waits for a silent process, and the handler for the locks of others, unless
   * the application has set a limit of its own for that.
   */
  begin(values: ClaimValues, savepoint: string, idleMs: number): string {
    return `
BEGIN;
SET LOCAL idle_in_transaction_session_timeout = ${idleMs};
${this.#claim('pg_try_advisory_xact_lock', values)};
SAVEPOINT ${savepoint};
SELECT relnamespace::regnamespace::text AS schema FROM pg_class WHERE oid = ${this.#literal}::regclass;
SELECT set_config('lock_timeout', '${idleMs}', true) WHERE current_setting('lock_timeout') = '0'`
  }

  #claim(tryLock: string, values: ClaimValues): string {
    const { key, token, takeover } = values
    const table = this.#table
    const isNew = `(NOT ${isClaimed('old.')} OR old.expires_at <= clock_timestamp())`
    const isOurs = "(old.state = 'running' AND old.token = EXCLUDED.token)"
    const found = (mine: string, other: string) =>
      `CASE WHEN ${isNew} THEN NULL WHEN ${isOurs} THEN old.${mine} ELSE ${other} END`
    return `
WITH held AS MATERIALIZED (
  ${this.#held(key)}
), chance AS MATERIALIZED (
  SELECT ${tryLock}(${this.#lock(key)}) AS taken WHERE NOT EXISTS (
    SELECT FROM held
    WHERE NOT ${isClaimed()}
      OR (NOT (state = 'running' AND token = ${token}) AND (lease_end > moment OR NOT ${takeover}))
  )
), taken AS (
  INSERT INTO ${table} AS old (key, version, token, fingerprint, attempt, state, lease_end, retain_ms, expires_at)
  SELECT ${this.#newRow(values)}
  FROM chance WHERE chance.taken
  ON CONFLICT (key) DO UPDATE SET
    version = EXCLUDED.version, token = EXCLUDED.token, fingerprint = EXCLUDED.fingerprint,
    attempt = CASE WHEN ${isNew} THEN 1 WHEN ${isOurs} THEN old.attempt ELSE old.attempt + 1 END,
    found_state = ${found('found_state', "CASE old.state WHEN 'ended' THEN 'ended' ELSE 'abandoned' END")},
    found_fingerprint = ${found('found_fingerprint', 'old.fingerprint')},
    steps = CASE WHEN ${isNew} THEN NULL ELSE old.steps END,
    state = 'running', waiting = old.waiting AND old.state = 'running',
    lease_end = EXCLUDED.lease_end, retain_ms = EXCLUDED.retain_ms, expires_at = EXCLUDED.expires_at,
    created_at = NULL, status_code = NULL, headers = NULL, body = NULL, body_is_text = NULL, tombstone = NULL
  WHERE ${isReleased('old.')} OR old.expires_at <= clock_timestamp() OR (
    ${isClaimed('old.')} AND (${isOurs} OR (${takeover} AND old.lease_end <= clock_timestamp()))
  )
  RETURNING old.attempt, old.steps
)
SELECT ${FOUND} FROM held WHERE NOT EXISTS (SELECT FROM chance)
UNION ALL
SELECT 'acquired', attempt, ${NO_RECORD}, steps FROM taken
UNION ALL
SELECT 'locked', NULL, ${NOTHING_MORE} FROM chance WHERE NOT chance.taken`
  }

  /** A key that is free has no row at all: whatever there is of an old one is for `#claim`. */
  #claimAtOnce(values: Omit<ClaimValues, 'takeover'>): string {
    const { key, token } = values
    return `
WITH held AS MATERIALIZED (
  ${this.#held(key)}
), taken AS (
  INSERT INTO ${this.#table} (key, version, token, fingerprint, attempt, state, lease_end, retain_ms, expires_at)
  SELECT ${this.#newRow(values)}
  WHERE NOT EXISTS (SELECT FROM held) AND pg_try_advisory_xact_lock_shared(${this.#lock(key)})
  ON CONFLICT (key) DO NOTHING
  RETURNING attempt
)
SELECT ${plainlyFound(token)} FROM held
UNION ALL
SELECT 'acquired', attempt, ${NO_RECORD}, NULL FROM taken`
  }

  /** What a first attempt writes. */
  #newRow({ key, token, fingerprint, leaseMs, retainMs }: Omit<ClaimValues, 'takeover'>): string {
    return `${key}, ${VERSION}, ${token}, ${fingerprint}, 1, 'running',
    ${after(leaseMs)}, ${retainMs}, ${after(`(${leaseMs} + ${retainMs})`)}`
  }

  /** Of the rows that are looked at, each is judged by itself, so that a damaged one does not keep the rest from being seen. */
  #list(): string {
    return `
WITH looked AS MATERIALIZED (
  SELECT *, clock_timestamp() AS moment FROM ${this.#table}
  WHERE key >= coalesce($1::text, '') AND key IS DISTINCT FROM $1::text
  ORDER BY key LIMIT ${PAGE_ROWS}
), page AS (
  SELECT CASE WHEN count(*) = ${PAGE_ROWS} THEN max(key) END AS cursor FROM looked
), judged AS (
  SELECT *, ${VERDICT} AS found FROM looked
), listed AS (
  SELECT ${LISTED} FROM judged
  WHERE CASE
    WHEN NOT ${COUNTS} OR NOT ${KIND} = ANY ($2::text[]) OR ${this.#isHeld('key')} THEN false
    WHEN ${KIND} = 'reply' THEN ${IS_REPLY}
    ELSE true
  END
)
SELECT page.cursor, listed.* FROM page LEFT JOIN listed ON true ORDER BY key`
  }

  /**
   * Ends a claim, and tells those who wait; or sees that this token has ended it before.
   * @param is What is true of a row afterwards.
   */
  #finish(is: string, mine: string, changes: string): string {
    return `${this.#change(changes, `${mine} AND state = 'running'`)}
UNION ALL
SELECT NULL FROM ${this.#table} WHERE ${mine} AND ${is} AND NOT EXISTS (SELECT FROM done)`
  }

  /** Changes the row that is so, and tells those who wait. */
  #change(changes: string, is: string): string {
    return `
WITH done AS (
  UPDATE ${this.#table} SET ${changes}
  WHERE ${is}
  RETURNING key, waiting
)
SELECT CASE WHEN waiting THEN ${NOTIFY}::text END FROM done`
  }

  /** The row of a key, if it counts, and the one moment at which it is judged. */
  #held(key: string): string {
    return `SELECT *, clock_timestamp() AS moment FROM ${this.#table} WHERE key = ${key} AND ${COUNTS}`
  }

  /** The key of $1 whose row is so, unless a transaction holds it. For another one the lock would turn others away in vain. */
  #unheld(is: string): string {
    return `key = $1::text AND CASE WHEN ${is} THEN pg_try_advisory_xact_lock_shared(${this.#lock('$1::text')}) END`
  }

  #lock(key: string): string {
    return `hashtextextended(${key}, ${this.#literal}::regclass::oid::bigint)`
  }

  /** Does some transaction hold the key? Without taking the lock for a moment, which would turn others away. */
  #isHeld(key: string): string {
    return `${this.#lock(key)} IN (
  SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks
  WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND objsubid = 1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)`
  }
}

/**
 * Tells the server that the process is alive, and whether a connection like this one waits for what this one has locked: of
 * the same role and application on the same host. Of them the server tells everything; `wait_event_type` goes first, because
 * who blocks whom is not asked for nothing. In a transaction the server tells what it has told before, unless it is told to
 * look anew.
 */
export const KEEP_ALIVE = `
SELECT pg_stat_clear_snapshot();
SELECT FROM pg_stat_activity AS other JOIN pg_stat_activity AS own ON own.pid = pg_backend_pid()
WHERE CASE WHEN other.wait_event_type = 'Lock' AND other.datid = own.datid AND other.usesysid = own.usesysid
  AND other.application_name = own.application_name AND other.client_addr IS NOT DISTINCT FROM own.client_addr
  THEN own.pid = ANY (pg_blocking_pids(other.pid)) ELSE false END
LIMIT 1`
