import { setImmediate as turn } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { TransientMap, TransientSet } from '../../lib/util/transient.js'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as (options?: { type: 'minor' }) => void

class Item {
  previous: Item | null = null
  next: Item | null = null
  readonly content: number[]

  constructor(length = 1) {
    this.content = new Array(length).fill(0.5)
  }
}

t.test('a map has what was put into it last, until it is deleted', async (t) => {
  const map = new TransientMap<string, Item>()
  const [a, b] = [new Item(), new Item()]
  t.strictSame([map.get('a'), map.has('a'), map.size], [undefined, false, 0])
  map.set('a', a)
  map.set('b', b)
  t.equal(map.get('a'), a)
  t.strictSame([map.has('a'), map.size], [true, 2])
  map.set('a', b)
  t.equal(map.get('a'), b)
  t.equal(map.size, 2)
  map.delete('a')
  map.delete('a')
  map.delete('never there')
  t.strictSame([map.get('a'), map.has('a'), map.size], [undefined, false, 1])
  t.equal(map.get('b'), b)
  map.set('a', a)
  t.equal(map.get('a'), a)
})

t.test('a set has each item once, in the order in which they came', async (t) => {
  const all = [new Item(), new Item(), new Item(), new Item()] as const
  for (const gone of all) {
    const set = new TransientSet<Item>()
    for (const item of [...all, ...all]) {
      set.add(item)
      t.ok(set.has(item))
    }
    const isIn = (items: Item[]) => items.map((item) => all.indexOf(item))
    t.strictSame(isIn(set.items()), [0, 1, 2, 3])
    set.delete(gone)
    set.delete(gone)
    t.notOk(set.has(gone))
    t.equal(set.size, 3)
    const rest = all.filter((item) => item !== gone)
    t.strictSame(isIn(set.items()), isIn([...rest]))
    set.add(gone)
    t.strictSame(isIn(set.items()), isIn([...rest, gone]))
    for (const item of set.items()) set.delete(item)
    t.strictSame([set.size, set.items().length], [0, 0])
    for (const item of all) t.strictSame([set.has(item), item.previous, item.next], [false, null, null])
  }
})

t.test('an item may leave while all are looked at', async (t) => {
  const set = new TransientSet<Item>()
  const items = [new Item(), new Item(), new Item()]
  for (const item of items) set.add(item)
  let seen = 0
  for (const _ of set.items()) {
    seen++
    for (const item of items) set.delete(item)
  }
  t.equal(seen, 3)
  t.equal(set.size, 0)
})

/* What this is for: in place of them, Map and Set keep a third of it. */

const IN_FLIGHT = 16
const ROUNDS = 4_000
/** Words of eight bytes. */
const LENGTH = 4_000

/** How many bytes there are more when so many items have come and gone, and there were no collections but scavenges. */
async function keptOf(add: (n: number, item: Item) => void, remove: (n: number, item: Item) => void): Promise<number> {
  const flying = Array.from({ length: IN_FLIGHT }, () => new Item(LENGTH))
  flying.forEach((item, n) => {
    add(n, item)
  })
  // From now on what is there is in the old generation.
  collect()
  const before = process.memoryUsage().heapUsed
  for (let n = IN_FLIGHT; n < ROUNDS; n++) {
    const at = n % IN_FLIGHT
    remove(n - IN_FLIGHT, flying[at] as Item)
    const item = new Item(LENGTH)
    flying[at] = item
    add(n, item)
  }
  await turn()
  collect({ type: 'minor' })
  collect({ type: 'minor' })
  return process.memoryUsage().heapUsed - before
}

/** What is in flight when a scavenge comes may get old. */
const FEW_BYTES = (ROUNDS * LENGTH * 8) / 8

t.test('what has gone from a map is garbage to a scavenge', async (t) => {
  const map = new TransientMap<number, Item>()
  t.ok(
    (await keptOf(
      (n, item) => map.set(n, item),
      (n) => map.delete(n)
    )) < FEW_BYTES
  )
})

t.test('what has gone from a set is garbage to a scavenge', async (t) => {
  const set = new TransientSet<Item>()
  t.ok(
    (await keptOf(
      (_, item) => set.add(item),
      (_, item) => set.delete(item)
    )) < FEW_BYTES
  )
})
