import type { RedisClient } from './client.js'
import { type Argument, runScript } from './run-script.js'
import { RENEW } from './scripts.js'

/** A script must not hold up the server for longer than a few milliseconds. */
const MOST_AT_ONCE = 500

/** A claim to be renewed, and who wants to know. */
interface Renewal {
  readonly key: string
  readonly owner: Argument
  readonly leaseMs: number
  resolve(renewed: boolean): void
  reject(error: unknown): void
}

/** Claims that are due together are renewed together: thousands of scripts would stall the process. */
export class Renewals {
  readonly #client: RedisClient
  readonly #mostAtOnce: number
  #due: Renewal[] = []

  /** In a Cluster each goes alone, because the keys of a script must share a slot. */
  constructor(client: RedisClient, isCluster: boolean) {
    this.#client = client
    this.#mostAtOnce = isCluster ? 1 : MOST_AT_ONCE
  }

  renew(key: string, owner: Argument, leaseMs: number): Promise<boolean> {
    return new Promise((resolve, reject) => {
      if (this.#due.push({ key, owner, leaseMs, resolve, reject }) === 1) setImmediate(this.#send)
    })
  }

  readonly #send = () => {
    const due = this.#due
    this.#due = []
    for (let at = 0; at < due.length; at += this.#mostAtOnce) void this.#renew(due.slice(at, at + this.#mostAtOnce))
  }

  async #renew(lot: readonly Renewal[]): Promise<void> {
    const keys = lot.map(({ key }) => key)
    const args = lot.flatMap(({ owner, leaseMs }) => [owner, String(leaseMs)])
    let results: unknown[]
    try {
      results = (await runScript(this.#client, RENEW, keys, args)) as unknown[]
    } catch (error) {
      for (const { reject } of lot) reject(error)
      return
    }
    for (const [n, { resolve, reject }] of lot.entries()) {
      const result = results[n]
      // A number, or the text of an error; numbers may come as strings.
      if (Buffer.isBuffer(result) && !/^[01]$/.test(result.toString())) reject(new Error(result.toString()))
      else resolve(Number(result) === 1)
    }
  }
}
