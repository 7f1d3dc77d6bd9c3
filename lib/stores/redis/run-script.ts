import type { Argument, Link } from './connection.js'
import { discreet } from './errors.js'
import type { Script } from './scripts.js'

/* Scripts by their hash, and sent first to a server that does not know them. */

/** Runs a script, and sends it first to a server that does not know it. */
export async function runScript(
  link: Pick<Link, 'evaluate'>,
  script: Script,
  keys: readonly string[],
  args: readonly Argument[]
): Promise<unknown> {
  try {
    return await link.evaluate('EVALSHA', script.sha, keys, args)
  } catch (error) {
    if (!(error instanceof Error) || !error.message.startsWith('NOSCRIPT')) throw discreet(error)
  }
  try {
    return await link.evaluate('EVAL', script.source, keys, args)
  } catch (error) {
    throw discreet(error)
  }
}
