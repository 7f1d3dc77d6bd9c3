import type { Finished, ListedKey, ListedKind, ListedPage, Unfinished } from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { kindOf } from '../listed-kind.js'
import type { RedisConnection } from './connection.js'
import { runScript } from './run-script.js'
import { script } from './scripts.js'
import { ABANDONED, CLAIM, ENDED, RECORD, summarise } from './values.js'
import { Walk } from './walk.js'

/* What a store has, page by page, without reading what may be large. */

/** In how many bytes of a value all but a body mostly is. */
const HEAD_BYTES = 2_048
/** As GETRANGE counts. */
const LAST = '-1'

/**
 * Looks at any number of keys.
 *
 *   KEYS[n]  a key
 *   ARGV[1]  the first bytes of values that are of interest
 *   ARGV[2]  up to which byte they are, as GETRANGE counts
 *
 * Returns for each key {the bytes, PTTL}, or nothing. What is no text is of no interest; any other error is that of all.
 */
export const LOOK = script(`
local found = {}
for n, key in ipairs(KEYS) do
  local kind = redis.pcall('GETRANGE', key, 0, 0)
  if type(kind) == 'table' then
    if not string.find(kind.err, 'WRONGTYPE') then return kind end
    kind = ''
  end
  local wanted = kind ~= '' and string.find(ARGV[1], kind, 1, true)
  found[n] = wanted and {redis.call('GETRANGE', key, 0, ARGV[2]), redis.call('PTTL', key)} or false
end
return found`)

/** In which values something of a kind may be. */
const KINDS: Record<ListedKind, readonly number[]> = {
  running: [CLAIM],
  abandoned: [CLAIM, ENDED, ABANDONED],
  reply: [RECORD],
  tombstone: [RECORD]
}

type Look = readonly [value: Buffer, left: unknown] | null

/** Lists the keys that have the prefix of a store. */
export class Listing {
  readonly #connection: RedisConnection
  readonly #prefix: string
  readonly #walk: Walk

  constructor(connection: RedisConnection, prefix: string) {
    this.#connection = connection
    this.#prefix = prefix
    this.#walk = new Walk(connection, prefix)
  }

  async page(kinds: readonly ListedKind[], from: string | null): Promise<ListedPage> {
    const { keys: names, cursor } = await this.#walk.page(from)
    const interest = String.fromCharCode(...kinds.flatMap((kind) => KINDS[kind]))
    const looks = await this.#look(names, interest, String(HEAD_BYTES - 1))
    const keys: ListedKey[] = []
    for (const [n, key] of names.entries()) {
      const found = looks[n] && (await this.#summary(key, looks[n], interest))
      if (found && kinds.includes(kindOf(found))) keys.push({ ...found, key })
    }
    return { keys, cursor }
  }

  /** In a Cluster each goes alone, because the keys of a script must share a slot. */
  async #look(keys: readonly string[], interest: string, last: string): Promise<Look[]> {
    if (keys.length === 0) return []
    const lots = this.#connection.isCluster ? keys.map((key) => [key]) : [keys]
    const looks = await Promise.all(
      lots.map((lot) =>
        runScript(
          this.#connection,
          LOOK,
          lot.map((key) => this.#prefix + key),
          [interest, last]
        )
      )
    )
    return (looks as Look[][]).flat()
  }

  /** `null` for what is damaged, which must not keep the rest from being seen. */
  async #summary(
    key: string,
    [head, left]: Exclude<Look, null>,
    interest: string
  ): Promise<Unfinished | Finished | null> {
    try {
      const found = summarise(head, Number(left), head.length < HEAD_BYTES)
      if (found !== null) return found
      const [whole] = await this.#look([key], interest, LAST)
      return whole ? summarise(whole[0], Number(whole[1]), true) : null
    } catch (error) {
      if (error instanceof UnreadableAnswer) return null
      throw error
    }
  }
}
