import type { RedisConnection } from './connection.js'
import { discreet, isRefused } from './errors.js'
import { Masters } from './masters.js'
import { runScript } from './run-script.js'
import { script } from './scripts.js'

/* Which keys a store has, page by page: SCAN, on each master of a Cluster in turn. */

/** How many names a server looks at for one page, be they the store's or not. */
const COUNT = 300
/** How often a master is asked by a name that turns out to be another's, as one of a slot that is on its way. */
const MOST_TRIES = 3
/** What SCAN begins with, and ends with. */
const END = '0'
/** In a cursor, where there is nothing to say. */
const NOTHING = '-'

/**
 * Some of the names of a master.
 *
 *   KEYS[1]  a name that is this master's
 *   ARGV[1]  where SCAN goes on
 *   ARGV[2]  what names have to match
 *   ARGV[3]  how many it looks at
 *
 * Returns {the id of the master, what SCAN gives, what INFO tells of the server unless it is refused}.
 */
export const SCAN = script(`
local info = redis.pcall('INFO', 'server')
if type(info) == 'table' then info = '' end
return {redis.call('CLUSTER', 'MYID'), redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3]), info}`)

/** How far a walk has come. */
interface Place {
  /** Where SCAN goes on, which only the server that has said so understands: another one has another order. */
  readonly scan: string
  /** Which process that was; empty where it does not tell. */
  readonly run: string
  /** `Masters.digest`, and which of these masters it was. Empty where there is but one server. */
  readonly masters: string
  readonly at: number
}

export interface KeysPage {
  readonly keys: readonly string[]
  readonly cursor: string | null
}

interface Scanned {
  readonly keys: readonly string[]
  readonly scan: string
  readonly run: string
}

/** A walk over all keys that have the prefix of a store. */
export class Walk {
  readonly #connection: RedisConnection
  readonly #prefix: string
  /** With the client's own prefix in front, as servers have it. */
  readonly #whole: Buffer
  readonly #match: Buffer

  constructor(connection: RedisConnection, prefix: string) {
    this.#connection = connection
    this.#prefix = prefix
    this.#whole = Buffer.concat([Buffer.from(connection.keyPrefix), Buffer.from(prefix)])
    this.#match = startingWith(this.#whole)
  }

  /** Rejects when the server that the cursor is from has gone, or when the masters are others by now. */
  async page(cursor: string | null): Promise<KeysPage> {
    const place = cursor === null ? { scan: END, run: '', masters: '', at: 0 } : placeOf(cursor)
    return this.#connection.isCluster ? this.#pageOfMaster(place, cursor === null) : this.#pageOfServer(place)
  }

  async #pageOfServer(place: Place): Promise<KeysPage> {
    const [scan, info] = await this.#connection.scan(place.scan, this.#match, COUNT)
    if (scan?.[0]) throw discreet(scan[0])
    if (info?.[0] && !isRefused(info[0])) throw discreet(info[0])
    const { keys, ...next } = this.#understand(place, scan?.[1], info?.[1])
    return { keys, cursor: next.scan === END ? null : cursorOf({ ...place, ...next }) }
  }

  async #pageOfMaster(place: Place, isFirst: boolean): Promise<KeysPage> {
    const masters = new Masters(await this.#connection.slots(), this.#whole)
    const { digest, ids } = masters
    if (!isFirst && place.masters !== digest) {
      throw new Error(
        'The masters of the Redis Cluster, or their slots, are not those that this cursor is from: list from the beginning'
      )
    }
    const id = ids[place.at]
    if (id === undefined) throw new Error('No master of the Redis Cluster has the slots of these keys')
    const [scan, info] = await this.#scanMaster(masters, id, place.scan)
    const { keys, ...next } = this.#understand(place, scan, info)
    if (next.scan !== END) return { keys, cursor: cursorOf({ ...next, masters: digest, at: place.at }) }
    const at = place.at + 1
    return { keys, cursor: at < ids.length ? cursorOf({ scan: END, run: '', masters: digest, at }) : null }
  }

  async #scanMaster(masters: Masters, id: string, from: string): Promise<[scan: unknown, info: unknown]> {
    for (let tries = 0; tries < MOST_TRIES; tries++) {
      const name = this.#prefix + masters.suffixFor(id)
      const answer = await runScript(this.#connection, SCAN, [name], [from, this.#match, String(COUNT)])
      const [found, scan, info] = answer as [unknown, unknown, unknown]
      if (String(found) === id) return [scan, info]
    }
    throw new Error('Another master of the Redis Cluster than was asked has answered: try again')
  }

  #understand(place: Place, answer: unknown, info: unknown): Scanned {
    const run = /^run_id:([0-9a-f]+)/m.exec(String(info))?.[1] ?? ''
    if (place.scan !== END && place.run !== run) {
      throw new Error('The Redis server that this cursor is from is gone, or was started anew: list from the beginning')
    }
    const [scan, names] = answer as [unknown, Buffer[]]
    return { keys: names.flatMap((name) => this.#keyIn(name) ?? []), scan: String(scan), run }
  }

  /** `null` for what is no text, and so no key of a store. */
  #keyIn(name: Buffer): string | null {
    const bytes = name.subarray(this.#whole.length)
    const key = bytes.toString()
    return bytes.equals(Buffer.from(key)) ? key : null
  }
}

/** The pattern that all names with this prefix match, and no others. */
function startingWith(prefix: Buffer): Buffer {
  return Buffer.from(`${prefix.toString('latin1').replace(/[*?[\]\\]/g, '\\$&')}*`, 'latin1')
}

function cursorOf({ scan, run, masters, at }: Place): string {
  return [scan, run || NOTHING, masters || NOTHING, at].join(' ')
}

/** @throws when it is no cursor of this kind of store. */
function placeOf(cursor: string): Place {
  const parts = /^(\d+) ([0-9a-f]+|-) ([0-9a-f]+|-) (\d+)$/.exec(cursor)
  if (parts === null) throw new Error('That is no cursor of a RedisStore')
  const [, scan, run, masters, at] = parts as unknown as [string, string, string, string, string]
  const said = (part: string) => (part === NOTHING ? '' : part)
  return { scan, run: said(run), masters: said(masters), at: Number(at) }
}
