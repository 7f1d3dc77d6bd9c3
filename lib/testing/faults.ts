/* A store that fails, is silent, or is late, because it was told to. */

type Answering = <T>(call: () => Promise<T>, counts: boolean) => Promise<T>

const atOnce: Answering = (call) => call()

/** What becomes of the calls to a store. */
export class Faults {
  #answering: Answering = atOnce
  /** What ends the waiting of calls. */
  readonly #waiting = new Set<() => void>()

  fail(calls: number): void {
    if (!(calls >= 1)) throw new RangeError(`fail() takes how many calls are to fail, 1 or more, got ${calls}`)
    let left = calls
    this.#answering = (_, counts) => {
      if (counts && --left <= 0) this.#answering = atOnce
      return Promise.reject(new Error('The TestStore was told to fail'))
    }
  }

  hang(): void {
    this.#answering = () =>
      new Promise((_, reject) => {
        this.#waiting.add(() => reject(new Error('The TestStore has not answered')))
      })
  }

  /** @returns what lets go of the calls that wait, and of those to come. */
  hold(): () => void {
    let open!: () => void
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    this.#waiting.add(open)
    const late: Answering = (call) => gate.then(call)
    this.#answering = late
    return () => {
      if (this.#answering === late) this.#answering = atOnce
      open()
    }
  }

  recover(): void {
    this.#answering = atOnce
    for (const end of this.#waiting) end()
    this.#waiting.clear()
  }

  /**
   * Asks the store, as far as it can be asked now.
   * @param counts It is one of the calls that `fail` counts.
   */
  ask<T>(call: () => Promise<T>, counts = true): Promise<T> {
    return this.#answering(call, counts)
  }
}
