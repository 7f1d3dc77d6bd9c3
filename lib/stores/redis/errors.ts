import { StoreFull } from '../../errors.js'

/* What the errors of Redis mean, and what of them may be shown. */

/** The error without the command that it carries: the command's arguments are somebody's reply, and errors are logged. */
export function discreet(error: unknown): Error {
  const { name = 'Error', message = String(error) } = error instanceof Error ? error : {}
  // So says a server of a command that it does not know, as one that is renamed: `unknown command 'SET', with args …`.
  return Object.assign(new Error(message.replace(/,? with args beginning with:.*/s, '')), { name })
}

/** Before Redis 7 a script's error says first that it is one. */
export function isWrongType(error: unknown): boolean {
  return /\bWRONGTYPE Operation\b/.test((error as Error).message)
}

/** Is it by which a server says that it does not know NX and GET together? */
export function isSyntaxError(error: Error): boolean {
  return /syntax error/i.test(error.message)
}

/** Is it by which a server says that it is a replica, as after a failover? */
export function isReadOnly(error: unknown): error is Error {
  return error instanceof Error && error.message.startsWith('READONLY')
}

/** Is it by which a server says that it does not know a command, or that the user of the connection may not give it? */
export function isRefused(error: Error): boolean {
  return /^NOPERM |^ERR unknown command/.test(error.message)
}

/** What a claim is told: a server without room that does not evict (maxmemory, noeviction) is there, and refuses. */
export function claimFailure(error: unknown): unknown {
  if (!/\bOOM command not allowed/.test((error as Error).message)) return error
  return new StoreFull('Redis is full, and takes no further claim (maxmemory)', { cause: error })
}
