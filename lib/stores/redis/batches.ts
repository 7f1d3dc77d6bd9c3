import { Batch } from '../../util/batch.js'
import type { IoredisClient } from './client.js'
import type { Result } from './connection.js'
import { discreet } from './errors.js'

/* Claims that are asked for in one turn of the event loop go to Redis in one pipeline. */

/** The part of an ioredis pipeline that is used here. */
export interface Pipeline {
  setBuffer(key: string, value: string | Buffer, ...options: (string | number)[]): Pipeline
  getBuffer(key: string): Pipeline
  pttl(key: string): Pipeline
  scanBuffer(cursor: string, match: 'MATCH', pattern: Buffer, limit: 'COUNT', count: number): Pipeline
  info(section: string): Pipeline
  set(key: string, value: string, ...options: (string | number)[]): Pipeline
  wait(replicas: number, timeout: number): Pipeline
  exec(): Promise<Result[] | null>
}

/** What a claim asks for: SET NX GET and PTTL of one key. */
interface Question {
  readonly key: string
  readonly value: string | Buffer
  readonly expiry: string
}

type Answer = [set: Result, pttl: Result]

/** Pipelines cost more than the commands in them: what is asked in one turn of the event loop goes by the same one. */
export class ClaimBatches {
  readonly #client: IoredisClient
  readonly #questions = new Batch<Question, Answer>((questions) => this.#send(questions))

  constructor(client: IoredisClient) {
    this.#client = client
  }

  /** SET NX GET and PTTL of one key, next to each other. */
  ask(key: string, value: string | Buffer, expiry: string): Promise<Answer> {
    return this.#questions.ask({ key, value, expiry })
  }

  #send(questions: Question[]): Promise<(Answer | Error)[]> {
    const pipeline = this.#client.pipeline() as Pipeline
    for (const { key, value, expiry } of questions) {
      pipeline.setBuffer(key, value, 'PX', expiry, 'NX', 'GET').pttl(key)
    }
    return pipeline.exec().then(
      (results) =>
        questions.map((_, n) => {
          const [set, pttl] = [results?.[2 * n], results?.[2 * n + 1]]
          return set && pttl ? [set, pttl] : new Error('Redis gave no answer')
        }),
      (error) => {
        throw discreet(error)
      }
    )
  }
}
