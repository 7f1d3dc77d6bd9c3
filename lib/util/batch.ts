/** One that was asked for, and who wants to know. */
interface Asked<Item, Answer> {
  readonly item: Item
  resolve(answer: Answer): void
  reject(error: unknown): void
}

/** Sends together what is asked for in one turn of the event loop, when all that has come in by then was read. */
export class Batch<Item, Answer> {
  readonly #send: (items: Item[]) => Promise<(Answer | Error)[]>
  readonly #most: number
  #asked: Asked<Item, Answer>[] = []

  /**
   * @param send Gives an answer or an error for each item, in their order; or rejects for all of them.
   * @param most How many items are sent together at most.
   */
  constructor(send: (items: Item[]) => Promise<(Answer | Error)[]>, most = Number.POSITIVE_INFINITY) {
    this.#send = send
    this.#most = most
  }

  ask(item: Item): Promise<Answer> {
    return new Promise((resolve, reject) => {
      if (this.#asked.push({ item, resolve, reject }) === 1) setImmediate(this.#flush)
    })
  }

  readonly #flush = () => {
    const asked = this.#asked
    this.#asked = []
    for (let at = 0; at < asked.length; at += this.#most) this.#sendLot(asked.slice(at, at + this.#most))
  }

  #sendLot(lot: Asked<Item, Answer>[]): void {
    this.#send(lot.map(({ item }) => item)).then(
      (answers) => {
        for (const [n, { resolve, reject }] of lot.entries()) {
          const answer = answers[n] as Answer | Error
          if (answer instanceof Error) reject(answer)
          else resolve(answer)
        }
      },
      (error) => {
        for (const { reject } of lot) reject(error)
      }
    )
  }
}
