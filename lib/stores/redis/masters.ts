import { sha256 } from '../storable-text.js'

/* The masters of a Cluster, and by which names each of them is found. */

const SLOTS = 16_384
const LARGEST_NUMBER = 1e9

type Range = readonly [first: number, last: number, id: string]

/** The masters that may have names with a prefix, as one server of the Cluster knows them. */
export class Masters {
  /** Another one as soon as any slot is another master's. */
  readonly digest: string
  /** In an order that stays while the digest does. */
  readonly ids: readonly string[]
  readonly #owners: readonly (string | undefined)[]
  readonly #prefix: Buffer

  /** @param answer What CLUSTER SLOTS gives */
  constructor(answer: unknown, prefix: Buffer) {
    const ranges = (answer as unknown[]).map(rangeOf).sort(([first], [other]) => first - other)
    const owners = Array<string | undefined>(SLOTS).fill(undefined)
    for (const [first, last, id] of ranges) owners.fill(id, first, last + 1)
    const possible = hashed(prefix) === prefix ? owners : [owners[slotOf(prefix)]]
    this.digest = sha256(JSON.stringify(ranges)).slice(0, 16)
    this.ids = [...new Set(possible.filter((id) => id !== undefined))].sort()
    this.#owners = owners
    this.#prefix = prefix
  }

  /**
   * What makes of the prefix a name that is this master's. Clients find the master of a name by themselves, wherever they have to
   * connect for it; and notice so when what they know of the Cluster is out of date.
   */
  suffixFor(id: string): string {
    // Another one each time: while a slot is on its way, its master sends all who ask for a name without a value to the next one.
    for (let n = Math.floor(Math.random() * LARGEST_NUMBER); ; n++) {
      const suffix = String(n)
      if (this.#owners[slotOf(Buffer.concat([this.#prefix, Buffer.from(suffix)]))] === id) return suffix
    }
  }
}

/** Numbers may come as strings. Behind its address a master has its id. */
function rangeOf(row: unknown): Range {
  const [first, last, [, , id]] = row as [unknown, unknown, unknown[]]
  return [Number(first), Number(last), String(id)]
}

/** The slot of a name: CRC16 (XMODEM) of what counts of it. */
export function slotOf(name: Buffer): number {
  let crc = 0
  for (const byte of hashed(name)) {
    crc ^= byte << 8
    for (let bit = 0; bit < 8; bit++) crc = crc & 0x8000 ? (crc << 1) ^ 0x1021 : crc << 1
  }
  return crc & (SLOTS - 1)
}

/** What counts of a name: what is in its first braces, unless that is nothing. */
function hashed(name: Buffer): Buffer {
  const open = name.indexOf('{')
  const close = open === -1 ? -1 : name.indexOf('}', open)
  return close > open + 1 ? name.subarray(open + 1, close) : name
}
