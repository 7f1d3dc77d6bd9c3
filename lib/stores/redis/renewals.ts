import { Batch } from '../../util/batch.js'
import type { Argument, RedisConnection } from './connection.js'
import { runScript } from './run-script.js'
import { RENEW } from './scripts.js'

/* Claims that are due together are renewed together. */

/** A script must not hold up the server for longer than a few milliseconds. */
const MOST_AT_ONCE = 500

/** A claim to be renewed. */
interface Renewal {
  readonly key: string
  readonly owner: Argument
  readonly leaseMs: number
}

/** Claims that are due together are renewed together: thousands of scripts would stall the process. */
export class Renewals {
  readonly #connection: Pick<RedisConnection, 'evaluate'>
  readonly #due: Batch<Renewal, boolean>

  /** In a Cluster each goes alone, because the keys of a script must share a slot. */
  constructor(connection: Pick<RedisConnection, 'evaluate' | 'isCluster'>) {
    this.#connection = connection
    this.#due = new Batch((lot) => this.#renew(lot), connection.isCluster ? 1 : MOST_AT_ONCE)
  }

  renew(key: string, owner: Argument, leaseMs: number): Promise<boolean> {
    return this.#due.ask({ key, owner, leaseMs })
  }

  async #renew(lot: Renewal[]): Promise<(boolean | Error)[]> {
    const keys = lot.map(({ key }) => key)
    const args = lot.flatMap(({ owner, leaseMs }) => [owner, String(leaseMs)])
    const results = (await runScript(this.#connection, RENEW, keys, args)) as unknown[]
    return lot.map((_, n) => isRenewed(results[n]))
  }
}

/** A number, or the text of an error; numbers may come as strings. */
function isRenewed(result: unknown): boolean | Error {
  if (Buffer.isBuffer(result) && !/^[01]$/.test(result.toString())) return new Error(result.toString())
  return Number(result) === 1
}
