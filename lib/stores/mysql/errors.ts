import { StoreFull } from '../../errors.js'

/* What the errors of MySQL and MariaDB mean: https://dev.mysql.com/doc/mysql-errors/8.0/en/server-error-reference.html */

/** An error of `mysql2`. The numbers of the server's are positive. */
export interface MysqlError extends Error {
  code?: string
  errno?: number
}

const DISK_FULL = 1021
/** MariaDB: the row has changed since the snapshot was taken. */
const CHECKREAD = 1020
const DUPLICATE_ENTRY = 1062
const TABLE_FULL = 1114
const NO_SUCH_TABLE = 1146
const PACKET_TOO_LARGE = 1153
const LOCK_WAIT_TIMEOUT = 1205
const DEADLOCK = 1213
const PREVENTED_BY_OPTION = 1290
const READ_ONLY_TRANSACTION = 1792
const READ_ONLY_MODE = 1836

function isOneOf(error: unknown, ...numbers: number[]): boolean {
  const { errno } = error as MysqlError
  return errno !== undefined && numbers.includes(errno)
}

/** Has a statement lost against others? It was undone as a whole, so that it would do no harm to repeat it. */
export function isContention(error: unknown): boolean {
  return isOneOf(error, DEADLOCK, LOCK_WAIT_TIMEOUT, CHECKREAD)
}

/** Is there a row of this key already? */
export function isDuplicate(error: unknown): boolean {
  return isOneOf(error, DUPLICATE_ENTRY)
}

/** Has the server become one that does not write, as after a failover? Another connection may lead to its successor. */
export function isReadOnly(error: unknown): boolean {
  return isOneOf(error, PREVENTED_BY_OPTION, READ_ONLY_TRANSACTION, READ_ONLY_MODE)
}

/** Has the server refused a statement for its length? It ends the connection then. */
export function isTooLarge(error: unknown): boolean {
  return isOneOf(error, PACKET_TOO_LARGE)
}

/** The error without the statement and the values that it may carry, which are somebody's reply. */
export function explain(error: unknown): Error {
  if (!(error instanceof Error)) return new Error(String(error))
  const { name, code, errno } = error as MysqlError
  return Object.assign(new Error(messageOf(error)), { name }, code && { code }, errno && { errno })
}

function messageOf(error: MysqlError): string {
  const { message, code } = error
  // "Duplicate entry '…' for key '…'", with what is stored.
  if (isDuplicate(error)) return 'Duplicate entry'
  if (isOneOf(error, NO_SUCH_TABLE)) return `${message}: create it by a migration, or by "await store.createTable()"`
  // That of several failed attempts to connect is empty.
  return message || `${code}`
}

/** What a claim is told: a server without room is there, and refuses. */
export function claimFailure(error: unknown): unknown {
  if (!isOneOf(error, DISK_FULL, TABLE_FULL)) return error
  const { message } = error as Error
  return new StoreFull(`The database is full, and takes no further claim (${message})`, { cause: error })
}
