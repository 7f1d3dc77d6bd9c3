import { StoreFull, UnreadableAnswer } from '../../errors.js'

/* What the errors of PostgreSQL mean to a claim. */

/** An error that the server has sent; others have no severity. */
export interface DatabaseError extends Error {
  /** In the server's language. */
  severity?: string
  /** https://www.postgresql.org/docs/current/errcodes-appendix.html */
  code?: string
}

const SERIALIZATION_FAILURE = '40001'
const DEADLOCK = '40P01'
const UNKNOWN_STATEMENT = '26000'
const DUPLICATE_STATEMENT = '42P05'
/** Among others: the table was changed since, so that what a prepared statement returns would be of other types. */
const NOT_SUPPORTED = '0A000'
const UNDEFINED_TABLE = '42P01'
/** A statement has failed in the transaction: it takes no other until it is rolled back, at least to a savepoint. */
export const IN_FAILED_TRANSACTION = '25P02'
const DISK_FULL = '53100'
const OUT_OF_MEMORY = '53200'

/** Classes of errors in which the server, or somebody who operates it, is to blame: resources, intervention, system. */
const SERVERS_OWN = /^(?:08|53|57|58|XX)/

/** Has a statement lost against other transactions, so that it would do no harm to repeat it? */
export function isContention(error: unknown): boolean {
  const { code } = error as DatabaseError
  return code === SERIALIZATION_FAILURE || code === DEADLOCK
}

/** Has a prepared statement not been carried out because of how it was prepared? */
export function isUnprepared(error: unknown): boolean {
  const { code } = error as DatabaseError
  return code === UNKNOWN_STATEMENT || code === DUPLICATE_STATEMENT || code === NOT_SUPPORTED
}

/** Has the server answered, if only by an error? */
export function isAnswer(error: unknown): error is DatabaseError {
  return (error as DatabaseError).severity !== undefined
}

/** Has the server refused a statement because of what was done before in the same transaction? */
export function isRefusal(error: unknown): boolean {
  return isAnswer(error) && !SERVERS_OWN.test(error.code ?? '')
}

/** The error without the values that it may carry, which are somebody's reply. */
export function explain(error: unknown): Error {
  if (error instanceof UnreadableAnswer) return error
  if (!(error instanceof Error)) return new Error(String(error))
  const { name, message, code } = error as DatabaseError
  if (code === UNDEFINED_TABLE)
    return new Error(`${message}: create it by a migration, or by "await store.createTable()"`)
  return Object.assign(new Error(message), { name }, code && { code })
}

/** What a claim is told, explained: a server without room is there, and refuses. */
export function claimFailure(error: unknown): Error {
  const cause = explain(error)
  const { code } = cause as DatabaseError
  if (code !== DISK_FULL && code !== OUT_OF_MEMORY) return cause
  return new StoreFull(`PostgreSQL is full, and takes no further claim (${cause.message})`, { cause })
}
