import type { RedisClient } from './client.js'
import { discreet } from './errors.js'

/** What one command of a pipeline gave. */
export type Result = [error: Error | null, result: unknown]

/** The part of an ioredis pipeline that is used here. */
export interface Pipeline {
  setBuffer(key: string, value: string | Buffer, ...options: (string | number)[]): Pipeline
  getBuffer(key: string): Pipeline
  pttl(key: string): Pipeline
  set(key: string, value: string, ...options: (string | number)[]): Pipeline
  wait(replicas: number, timeout: number): Pipeline
  exec(): Promise<Result[] | null>
}

/** Who asked for a key: two results are for it. */
interface Asker {
  resolve(results: [set: Result, pttl: Result]): void
  reject(error: unknown): void
}

/** Pipelines cost more than the commands in them: what is asked in one turn of the event loop goes by the same one. */
export class ClaimBatches {
  readonly #client: RedisClient
  #pipeline: Pipeline | null = null
  #askers: Asker[] = []

  constructor(client: RedisClient) {
    this.#client = client
  }

  /** SET NX GET and PTTL of one key, next to each other. */
  ask(key: string, value: string | Buffer, expiry: string): Promise<[set: Result, pttl: Result]> {
    if (this.#pipeline === null) {
      this.#pipeline = this.#client.pipeline() as Pipeline
      // All that has come in by now is read before.
      setImmediate(this.#send)
    }
    this.#pipeline.setBuffer(key, value, 'PX', expiry, 'NX', 'GET').pttl(key)
    return new Promise((resolve, reject) => this.#askers.push({ resolve, reject }))
  }

  readonly #send = () => {
    const pipeline = this.#pipeline as Pipeline
    const askers = this.#askers
    this.#pipeline = null
    this.#askers = []
    pipeline.exec().then(
      (results) => {
        for (const [n, { resolve, reject }] of askers.entries()) {
          const [set, pttl] = [results?.[2 * n], results?.[2 * n + 1]]
          if (set && pttl) resolve([set, pttl])
          else reject(new Error('Redis gave no answer'))
        }
      },
      (error) => {
        for (const { reject } of askers) reject(discreet(error))
      }
    )
  }
}
