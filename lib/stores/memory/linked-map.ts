/** An entry of a `LinkedMap`, between its neighbours. */
export abstract class Node {
  readonly key: string
  older: this | null = null
  newer: this | null = null

  constructor(key: string) {
    this.key = key
  }

  /** Bytes, roughly: the same at all times. */
  abstract get size(): number
}

/**
 * A map with an order and a size, for a FIFO (`MemoryStore`) as for an LRU (`LocalCache`): all in constant time. The iterators
 * of a Map are no way to its oldest entry: a new one walks over everything that was deleted before, and a kept one keeps
 * what it has not walked over.
 *
 * Not lru-cache, which serves the second only. Measured: it is as fast, and takes 13 bytes more for an entry, 45 with sizes
 * and ttls; a reply of 500 bytes is to take little more than itself.
 */
export class LinkedMap<T extends Node> {
  readonly #items = new Map<string, T>()
  #oldest: T | null = null
  #newest: T | null = null
  /** Where the last scan has come to. */
  #next: T | null = null
  /** Of all items together. */
  bytes = 0

  get length(): number {
    return this.#items.size
  }

  get oldest(): T | null {
    return this.#oldest
  }

  get(key: string): T | undefined {
    return this.#items.get(key)
  }

  values(): Iterable<T> {
    return this.#items.values()
  }

  /** As the newest, in the place of the one with the same key. */
  set(item: T): void {
    const before = this.#items.get(item.key)
    if (before !== undefined) this.remove(before)
    this.#items.set(item.key, item)
    this.bytes += item.size
    this.#append(item)
  }

  remove(item: T): void {
    this.#items.delete(item.key)
    this.bytes -= item.size
    this.#detach(item)
  }

  /** Makes it the newest. */
  touch(item: T): void {
    this.#detach(item)
    this.#append(item)
  }

  /** Visits up to `count` items, from where the last scan has ended, each of which may be removed. */
  scan(count: number, visit: (item: T) => void): void {
    this.#next ??= this.#oldest
    for (let n = 0; n < count && this.#next !== null; n++) {
      const item: T = this.#next
      this.#next = item.newer
      visit(item)
    }
  }

  #append(item: T): void {
    item.older = this.#newest
    item.newer = null
    if (this.#newest === null) this.#oldest = item
    else this.#newest.newer = item
    this.#newest = item
  }

  #detach(item: T): void {
    if (this.#next === item) this.#next = item.newer
    if (item.older === null) this.#oldest = item.newer
    else item.older.newer = item.newer
    if (item.newer === null) this.#newest = item.older
    else item.newer.older = item.older
    item.older = null
    item.newer = null
  }
}
