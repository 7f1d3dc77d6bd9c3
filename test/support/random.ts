/** A source of pseudo-random numbers that gives the same ones for the same seed (mulberry32). */
export class Random {
  #state: number

  constructor(readonly seed: number) {
    this.#state = seed | 0
  }

  /** At least 0, less than 1. */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }

  chance(probability: number): boolean {
    return this.next() < probability
  }

  /** An integer from `least` to `most`. */
  between(least: number, most: number): number {
    return least + Math.floor(this.next() * (most - least + 1))
  }
}

/** A new seed, or that of a run to be repeated: `SEED=123 node …`. */
export function newSeed(): number {
  return Number(process.env.SEED) || Math.floor(Math.random() * 2 ** 31)
}
