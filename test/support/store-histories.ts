import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Test } from 'tap'
import type { Acquisition, IdempotencyStore } from '../../types/index.js'
import { insist } from './flaky-store.js'
import type { Random } from './random.js'
import { claim, newKey, reply } from './store-fixtures.js'

// Random histories of a store whose calls take their time, overtake each other, and get lost. What a worker knows for
// certain is what had been answered before it asked, and what must hold is checked against that and no more.

const LONG = 60_000
const ROUNDS = 12
const WORKERS = 6

interface Outcome {
  /** How often a worker held the key. */
  held: number
  broken: string[]
}

/** With leases that do not lapse: one owner at a time, until somebody completes. */
export function exclusiveHistory(t: Test, clients: IdempotencyStore[], random: Random): Promise<unknown> {
  return t.test('never has two owners at once, and what is completed stays as it is', async (t) => {
    const outcome: Outcome = { held: 0, broken: [] }
    for (let round = 0; round < ROUNDS; round++) {
      const history = new ExclusiveHistory(random, outcome)
      await Promise.all(Array.from({ length: WORKERS }, (_, n) => history.work(clientOf(clients, n))))
    }
    t.strictSame(outcome.broken, [])
    t.ok(outcome.held > ROUNDS, `held ${outcome.held} times in ${ROUNDS} rounds`)
  })
}

class ExclusiveHistory {
  readonly #key = newKey()
  /** Those who were told that the key is theirs, and have not begun to give it away. */
  readonly #owners = new Set<string>()
  readonly #former: string[] = []
  readonly #records = new Records()
  readonly #random: Random
  readonly #outcome: Outcome

  constructor(random: Random, outcome: Outcome) {
    this.#random = random
    this.#outcome = outcome
  }

  async work(store: IdempotencyStore): Promise<void> {
    for (;;) {
      const token = randomUUID()
      const mine = claim({ token, fingerprint: token, takeover: this.#random.chance(0.5) })
      const { answer: found } = await insist(() => store.acquire(this.#key, mine))
      if (found.state === 'completed') {
        this.#check(this.#records.see(found), 'the record has changed')
        return
      }
      if (found.state === 'acquired') {
        this.#outcome.held++
        this.#check(found.attempt === 1, `attempt ${found.attempt} of a key that was never abandoned`)
        this.#owners.add(token)
        this.#check(this.#owners.size === 1, 'two owners at once')
        await this.#own(store, token)
      } else {
        this.#check(found.state === 'running', `${found.state} although no lease lapses`)
        await this.#meddle(store)
      }
    }
  }

  async #own(store: IdempotencyStore, token: string): Promise<void> {
    await sleep(this.#random.between(0, 3))
    if (this.#random.chance(0.5)) {
      this.#check((await insist(() => store.renew(this.#key, token, LONG))).answer, 'an owner could not renew')
    }
    if (this.#random.chance(0.8)) {
      this.#owners.delete(token)
      const { answer, repeated } = await insist(() => store.release(this.#key, token))
      // Whoever had to repeat it may come after the next owner.
      this.#check(answer || repeated, 'an owner could not release')
      this.#former.push(token)
    } else {
      this.#records.expect(token)
      this.#owners.delete(token)
      const { answer } = await insist(() => store.complete(this.#key, token, reply({ fingerprint: token }), null))
      this.#check(answer, 'an owner could not complete')
    }
  }

  /** What others try must not matter. */
  async #meddle(store: IdempotencyStore): Promise<void> {
    const former = this.#former.at(this.#random.between(-3, -1))
    const token = former ?? randomUUID()
    if (this.#random.chance(0.3)) {
      this.#check(!(await insist(() => store.renew(this.#key, token, LONG))).answer, 'a stranger could renew')
    } else if (this.#random.chance(0.5)) {
      const { answer } = await insist(() => store.complete(this.#key, token, reply({ fingerprint: token }), null))
      this.#check(!answer, 'a stranger could complete')
    } else {
      const { answer } = await insist(() => store.release(this.#key, token))
      // True is right for the last one who released it, while the key is free.
      this.#check(!answer || former !== undefined, 'a stranger could release')
    }
  }

  #check(holds: boolean, broken: string): void {
    if (!holds) this.#outcome.broken.push(broken)
  }
}

/** With leases that lapse all the time: who was overtaken has no say, and one of all completes. */
export function takeoverHistory(t: Test, clients: IdempotencyStore[], random: Random): Promise<unknown> {
  return t.test('gives each attempt to one owner, and is completed by the last one only', async (t) => {
    const outcome: Outcome = { held: 0, broken: [] }
    let attempts = 0
    for (let round = 0; round < ROUNDS; round++) {
      const history = new TakeoverHistory(random, outcome)
      await Promise.all(Array.from({ length: WORKERS }, (_, n) => history.work(clientOf(clients, n))))
      history.end()
      attempts += history.attempts
    }
    t.strictSame(outcome.broken, [])
    t.ok(attempts > ROUNDS, `${attempts} attempts in ${ROUNDS} rounds`)
  })
}

class TakeoverHistory {
  readonly #key = newKey()
  readonly #owners = new Map<number, string>()
  readonly #records = new Records()
  readonly #completed: number[] = []
  readonly #random: Random
  readonly #outcome: Outcome
  /** The highest attempt that somebody was told of. */
  attempts = 0

  constructor(random: Random, outcome: Outcome) {
    this.#random = random
    this.#outcome = outcome
  }

  async work(store: IdempotencyStore): Promise<void> {
    for (;;) {
      const token = randomUUID()
      const leaseMs = this.#random.between(1, 15)
      const takeover = this.#random.chance(0.7)
      const mine = claim({ token, fingerprint: token, leaseMs, takeover })
      const { answer: found } = await insist(() => store.acquire(this.#key, mine))
      if (found.state === 'completed') {
        this.#check(this.#records.see(found), 'the record has changed')
        return
      }
      if (found.state === 'abandoned') this.#check(!takeover, 'abandoned, and not taken over')
      if (found.state === 'acquired') await this.#own(store, token, found.attempt)
    }
  }

  async #own(store: IdempotencyStore, token: string, attempt: number): Promise<void> {
    this.#outcome.held++
    const other = this.#owners.get(attempt)
    this.#check(other === undefined || other === token, `attempt ${attempt} was given twice`)
    this.#owners.set(attempt, token)
    this.attempts = Math.max(this.attempts, attempt)
    await sleep(this.#random.between(0, 20))
    if (this.#random.chance(0.4)) {
      const overtaken = this.attempts > attempt
      const { answer } = await insist(() => store.renew(this.#key, token, this.#random.between(1, 15)))
      this.#check(!(overtaken && answer), `attempt ${attempt} was renewed after it was overtaken`)
    }
    if (this.#random.chance(0.4)) {
      const overtaken = this.attempts > attempt
      if (!overtaken) this.#records.expect(token)
      const { answer } = await insist(() => store.complete(this.#key, token, reply({ fingerprint: token }), null))
      this.#check(!(overtaken && answer), `attempt ${attempt} was completed after it was overtaken`)
      if (answer) this.#completed.push(attempt)
    }
  }

  end(): void {
    this.#check(this.#completed.length === 1, `attempts ${this.#completed} have completed`)
    this.#check(this.#completed[0] === this.attempts, `attempt ${this.attempts} came after ${this.#completed}`)
  }

  #check(holds: boolean, broken: string): void {
    if (!holds) this.#outcome.broken.push(broken)
  }
}

/** The record that was seen first is the one that everybody sees, and somebody with a right to it has stored it. */
class Records {
  readonly #expected = new Set<string>()
  #seen: string | undefined

  expect(token: string): void {
    this.#expected.add(token)
  }

  see(found: Acquisition & { state: 'completed' }): boolean {
    const { fingerprint } = found.record
    this.#seen ??= fingerprint
    return found.ttlMs === null && fingerprint === this.#seen && this.#expected.has(fingerprint)
  }
}

function clientOf(clients: IdempotencyStore[], n: number): IdempotencyStore {
  return clients[n % clients.length] as IdempotencyStore
}
