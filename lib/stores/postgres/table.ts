/*
 * The table of a PostgresStore. A row is in one of these states:
 *
 *   running    a claim: token, attempt, lease_end; remembered until expires_at. What it took over, if anything, is in
 *              found_state and found_fingerprint
 *   ended      a claim that was given back after its handler had run, or as if it had, and is nobody's; remembered until expires_at
 *   abandoned  the same, given back as what was abandoned when it took over; a claim that lapses stays 'running'
 *   completed  a record: either status_code, headers, body and body_is_text, or tombstone; kept until expires_at
 *   released   nobody's; remembers until expires_at who released it
 *
 * As long as something is unfinished, expires_at is `retain_ms` after the end of its lease, or after it was given back.
 *
 * The steps of what is running, ended or abandoned are in `steps`, each as the JSON array of its name and its result and a
 * newline, which stands nowhere else in it; NULL where there are none. A column of the row, no table of its own: whoever takes
 * over has waited for the row, and gets the steps as they are then, where a second table would be seen as it was before.
 *
 * A row whose expires_at has passed is as good as none. One in any other state, or of another version, is not ours: nobody gets
 * the key, and the row is left as it is, until it has expired or is deleted.
 */

/** The schema and the name of a table, or of its index, as SQL takes them. */
export function qualified(schema: string | null, name: string): string {
  const identifier = (text: string) => `"${text.replaceAll('"', '""')}"`
  return schema === null ? identifier(name) : `${identifier(schema)}.${identifier(name)}`
}

export function quoted(text: string): string {
  return `'${text.replaceAll("'", "''")}'`
}

/** The lock of something that one process at a time does; of two numbers, so that it is not that of any key. */
export function chore(name: string, table = '0'): string {
  return `hashtext('fastify-idempotency ${name}'), ${table}`
}

/**
 * The table, as a migration would create it. `version` says which form a row has, so that in a deploy an older process recognises what
 * a newer one has written, and takes it for neither free nor its own.
 */
export function tableDdl(schema: string | null, name: string): string {
  const table = qualified(schema, name)
  return `CREATE TABLE IF NOT EXISTS ${table} (
  key          text COLLATE "C" PRIMARY KEY,
  version      smallint NOT NULL DEFAULT 1,
  token        text NOT NULL,
  fingerprint  text NOT NULL,
  attempt      integer NOT NULL,
  state        text NOT NULL,
  waiting      boolean NOT NULL DEFAULT false,
  lease_end    timestamptz NOT NULL,
  retain_ms    double precision NOT NULL,
  expires_at   timestamptz NOT NULL,
  found_state  text,
  found_fingerprint text,
  created_at   numeric,
  status_code  smallint,
  headers      jsonb,
  body         bytea,
  body_is_text boolean,
  tombstone    text,
  steps        text COLLATE "C"
);
CREATE INDEX IF NOT EXISTS "${name}_expires_at" ON ${table} (expires_at);`
}

/**
 * Creates what is missing, once, however many processes call it at the same time. What is there is left in peace:
 * CREATE … IF NOT EXISTS takes a lock before it looks, behind which everything would have to wait.
 */
export function createTable(schema: string | null, name: string): string {
  const [table, index] = [name, `${name}_expires_at`].map((relation) => quoted(qualified(schema, relation)))
  const [create, createIndex] = tableDdl(schema, name).split(/(?<=;)\n/)
  return `
DO $do$ BEGIN
  IF to_regclass(${table}) IS NOT NULL AND to_regclass(${index}) IS NOT NULL THEN RETURN; END IF;
  PERFORM pg_advisory_xact_lock(${chore('create')});
  IF to_regclass(${table}) IS NULL THEN ${create} END IF;
  IF to_regclass(${index}) IS NULL THEN ${createIndex} END IF;
END $do$`
}
