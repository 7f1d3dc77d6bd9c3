/*
 * What a row is, in SQL. Where it says `moment`, that is the one time at which the row is judged, beside its columns; elsewhere
 * the clock is asked: a statement that changes a row may have waited for it.
 */

/** The version of all rows that are written here, and the only one that is understood. */
export const VERSION = 1

/** What `clock_timestamp()` will be after so many milliseconds. */
export function after(ms: string): string {
  return `clock_timestamp() + ${ms} * interval '1 millisecond'`
}

/** How many milliseconds it is until then; NULL for never, which no subtraction takes. */
function until(end: string): string {
  return `CASE WHEN isfinite(${end}) THEN extract(epoch FROM ${end} - moment) * 1000 END`
}

/** @param row `''`, or the row's name and a dot */
export function isClaimed(row = ''): string {
  return `(${row}version = ${VERSION} AND ${row}state IN ('running', 'ended', 'abandoned'))`
}

/** Free, but for the memory of who released it. */
export function isReleased(row = ''): string {
  return `(${row}version = ${VERSION} AND ${row}state = 'released')`
}

/** Somebody has the key, or its record is kept, for all one knows. */
export const COUNTS = `(NOT ${isReleased()} AND expires_at > clock_timestamp())`

/** A claim that is known to be nobody's, or whose lease has lapsed. */
export const IS_UNOWNED = `(${isClaimed()} AND (state <> 'running' OR lease_end <= clock_timestamp()))`

/** Not a claim that is running, nor anything else that may be one. */
export const IS_AT_REST = `(expires_at <= clock_timestamp() OR ${IS_UNOWNED} OR ${isReleased()}
    OR (version = ${VERSION} AND state = 'completed'))`

export const IS_TOMBSTONE = `(version = ${VERSION} AND state = 'completed' AND tombstone IS NOT NULL)`

/** What is found, in a row that counts. */
export const VERDICT = `CASE WHEN version <> ${VERSION} OR state NOT IN ('running', 'ended', 'abandoned', 'completed') THEN 'unknown'
    WHEN state <> 'running' THEN state WHEN lease_end > moment THEN 'running' ELSE 'abandoned' END`

/**
 * How long a lease or a record still lives; below zero: for how long an operation has had no owner. A numeric, which no setting rounds.
 */
const LEFT_MS = `(CASE WHEN state = 'running' THEN ${until('lease_end')} WHEN state = 'completed' THEN ${until('expires_at')}
    WHEN abs(retain_ms) < 'infinity' THEN ${until('expires_at')} - retain_ms END)::numeric`

const RECORD =
  "created_at, status_code, headers::text AS headers, encode(body, 'base64') AS body, body_is_text, tombstone, steps"

/** A row as it is read: what is found, and the columns of the record. */
export const FOUND = `
  ${VERDICT} AS found, attempt, fingerprint, ${LEFT_MS} AS left_ms, ${RECORD}`

/**
 * The same of a row that counts and needs no care: a record, without what is left of its life, or the claim of another that
 * is running. NULL is found in all others.
 */
export function plainlyFound(token: string): string {
  const isPlain = `version = ${VERSION} AND (state = 'completed' OR (state = 'running' AND token <> ${token} AND lease_end > moment))`
  return `
  CASE WHEN ${isPlain} THEN state END AS found, attempt, fingerprint,
  CASE WHEN state = 'running' THEN ${LEFT_MS} END AS left_ms, ${RECORD}`
}

/** The columns behind `attempt` where there is no row to read, and no steps. */
export const NO_RECORD = 'NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL'
export const NOTHING_MORE = `${NO_RECORD}, NULL`

/** A row as it is listed, with what is found: without what may be large. */
export const LISTED = `key, found, attempt, fingerprint, ${LEFT_MS} AS left_ms, created_at, status_code, tombstone`

/** Under which kind a row is listed, by what is found. */
export const KIND = `CASE found WHEN 'ended' THEN 'abandoned'
    WHEN 'completed' THEN CASE WHEN tombstone IS NULL THEN 'reply' ELSE 'tombstone' END ELSE found END`

/** Is there all that a reply has, without reading it? Of headers the same is asked as by `areHeaders`. */
export const IS_REPLY = `(body IS NOT NULL AND body_is_text IS NOT NULL AND jsonb_typeof(headers) = 'array'
    AND NOT jsonb_path_exists(headers, 'strict $[*] ? (
      @.type() != "array" || @.size() != 2 || @[0].type() != "string" || (@[1].type() != "string" && @[1].type() != "array")
      || (@[1].type() == "array" && exists(@[1][*] ? (@.type() != "string"))))', '{}', true))`
