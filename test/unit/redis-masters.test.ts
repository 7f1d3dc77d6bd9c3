import t from 'tap'
import { Masters, slotOf } from '../../lib/stores/redis/masters.js'

/* The masters of a Cluster, by what one of its servers says of the slots. */

const named = (name: string) => slotOf(Buffer.from(name))
const row = (first: unknown, last: unknown, id: string) => [
  first,
  last,
  ['127.0.0.1', 7_000, id, []],
  ['replica', 1, 'x']
]
const THREE = [row(0, 5_460, 'c'), row(5_461, 10_922, 'a'), row(10_923, 16_383, 'b')]
const masters = (answer: unknown = THREE, prefix = 'idempotency:') => new Masters(answer, Buffer.from(prefix))

t.test('a slot is the CRC16 of a name, or of what is in its first braces', async (t) => {
  // The check value of CRC16 (XMODEM), of which a slot is 14 bits.
  t.equal(named('123456789'), 0x31c3)
  t.equal(named(''), 0)
  t.equal(named('foo{bar}zap'), named('bar'))
  t.equal(named('foo{bar}{zap}'), named('bar'))
  t.equal(named('{é}'), named('é'))
  t.equal(named('foo{{bar}}zap'), named('{bar'))
  for (const whole of ['foo{}{bar}', 'foo{bar', 'foo}bar', '}foo{']) t.not(named(whole), named('bar'), whole)
})

t.test('masters are in the order of their ids, however the answer is sorted', async (t) => {
  t.strictSame(masters().ids, ['a', 'b', 'c'])
  const again = masters([...THREE].reverse())
  t.strictSame([again.ids, again.digest], [masters().ids, masters().digest])
  const asText = masters(THREE.map(([first, last, ...nodes]) => [String(first), String(last), ...nodes]))
  t.equal(asText.digest, masters().digest, 'numbers may come as text')
})

t.test('the digest is another one when a master is, or when one slot is', async (t) => {
  const others = [
    [row(0, 5_460, 'd'), ...THREE.slice(1)],
    [row(0, 5_461, 'c'), row(5_462, 10_922, 'a'), THREE[2]],
    [row(0, 5_460, 'c'), row(5_461, 16_383, 'a')],
    [...THREE.slice(1)]
  ].map((answer) => masters(answer).digest)
  t.equal(new Set([masters().digest, ...others]).size, 5)
})

t.test(
  'each master has a name with the prefix, be it for a single slot; masters without one are left out',
  async (t) => {
    for (const prefix of ['idempotency:', '', 'a{b', 'a}b', '{}:', 'ü']) {
      const slot = 4_321
      const answer = [row(0, slot - 1, 'a'), row(slot, slot, 'b'), row(slot + 1, 16_000, 'a')]
      const found = masters(answer, prefix)
      t.strictSame(found.ids, ['a', 'b'], prefix)
      for (let n = 0; n < 5; n++) {
        t.equal(named(prefix + found.suffixFor('b')), slot)
        const other = named(prefix + found.suffixFor('a'))
        t.ok(other !== slot && other <= 16_000, `${prefix}: ${other}`)
      }
    }
  }
)

t.test('a prefix with braces around something is all on one master', async (t) => {
  for (const prefix of ['{bar}:', 'a{bar}{b}', 'a{bar}b{']) {
    const found = masters(THREE, prefix)
    t.strictSame(found.ids, ['c'], prefix)
    t.equal(named(prefix + found.suffixFor('c')), named('bar'))
  }
  t.strictSame(masters([row(0, 10, 'a')], '{bar}:').ids, [], 'no master has its slot')
})

t.test('a name is another one each time', async (t) => {
  const names = new Set(Array.from({ length: 20 }, () => masters().suffixFor('a')))
  t.ok(names.size > 1)
})
