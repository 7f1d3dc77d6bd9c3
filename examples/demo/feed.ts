/* What the page is told: what happens, and how things stand. */

/** Of the two shops: the one with the plugin, and the one without. */
export type Side = 'with' | 'without'
export const SIDES: readonly Side[] = ['with', 'without']

/** Something that has happened, for the timeline. */
export interface Happening {
  what: string
  /** Wall-clock milliseconds since the epoch. */
  at: number
  side?: Side
  [detail: string]: unknown
}

/** What has come of it all. */
export interface Books {
  /** How often the handler was started. */
  runs: number
  /** How many parcels the warehouse has sent. */
  orders: number
  /** How often money was taken, and how much in all, in cents. */
  charges: number
  charged: number
}

export interface State {
  /** What the customers meant to buy. */
  wanted: { orders: number; amount: number }
  books: Record<Side, Books>
  store: { place: string; survives: boolean; running: boolean }
  shop: { pid: number | null }
}

/** One message. Who begins to listen gets all that has happened so far. */
export interface Message {
  now: number
  state: State
  happened: readonly Happening[]
  /** Forget what was told before. */
  anew: boolean
}

type Listener = (message: Message) => void

/** So many are kept for a page that is opened later. */
const KEPT = 400

export class Feed {
  readonly #state: () => State
  readonly #listeners = new Set<Listener>()
  #history: Happening[] = []

  constructor(state: () => State) {
    this.#state = state
  }

  tell(what: string, details: Omit<Partial<Happening>, 'what'> = {}): void {
    const happening = { at: Date.now(), ...details, what }
    this.#history = [...this.#history.slice(1 - KEPT), happening]
    this.#send([happening], false)
  }

  forget(): void {
    this.#history = []
    this.#send([], true)
  }

  /** @returns what ends it. */
  listen(listener: Listener): () => void {
    this.#listeners.add(listener)
    listener(this.#message(this.#history, true))
    return () => this.#listeners.delete(listener)
  }

  #send(happened: readonly Happening[], anew: boolean): void {
    for (const listener of this.#listeners) listener(this.#message(happened, anew))
  }

  #message(happened: readonly Happening[], anew: boolean): Message {
    return { now: Date.now(), state: this.#state(), happened, anew }
  }
}
