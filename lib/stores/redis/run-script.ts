import type { RedisClient } from './client.js'
import { discreet } from './errors.js'
import type { Script } from './scripts.js'

/* Scripts by their hash, and sent first to a server that does not know them. */

export type Argument = string | Buffer

type Evaluate = (script: string, keys: number, ...keysAndArgs: Argument[]) => Promise<unknown>

/** Runs a script, and sends it first to a server that does not know it. */
export async function runScript(
  client: RedisClient,
  script: Script,
  keys: readonly string[],
  args: readonly Argument[]
): Promise<unknown> {
  const { evalshaBuffer, evalBuffer } = client as unknown as { evalshaBuffer: Evaluate; evalBuffer: Evaluate }
  try {
    return await evalshaBuffer.call(client, script.sha, keys.length, ...keys, ...args)
  } catch (error) {
    if (!(error instanceof Error) || !error.message.startsWith('NOSCRIPT')) throw discreet(error)
  }
  try {
    return await evalBuffer.call(client, script.source, keys.length, ...keys, ...args)
  } catch (error) {
    throw discreet(error)
  }
}
