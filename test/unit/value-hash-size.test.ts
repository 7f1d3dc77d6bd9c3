import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { payloadOfBody } from '../../lib/http/fingerprint.js'

// Apart from unit/fingerprint because they take their time.

const JSON_TYPE = { 'content-type': 'application/json', 'content-length': '4' }

/** The payload of a body that Fastify has parsed. */
const payload = (body: unknown) => payloadOfBody({ body, headers: JSON_TYPE } as FastifyRequest)

/** The same, as it came over the wire. */
const json = (text: string) => payload(JSON.parse(text))

/** `depth` arrays or objects in each other. */
function nested(depth: number, leaf: unknown, kind: 'array' | 'object'): unknown {
  let value = leaf
  for (let i = 0; i < depth; i++) value = kind === 'array' ? [value] : { a: value }
  return value
}

t.test('a deep body neither crashes nor loses what is at its bottom', async (t) => {
  for (const kind of ['array', 'object'] as const) {
    const one = payload(nested(200_000, 1, kind))
    t.equal(one, payload(nested(200_000, 1, kind)), kind)
    t.not(one, payload(nested(200_000, 2, kind)), `${kind}: another leaf`)
    t.not(one, payload(nested(200_001, 1, kind)), `${kind}: another depth`)
  }
  t.not(json(`${'['.repeat(200_000)}${']'.repeat(200_000)}`), json('[]'))
})

t.test('a wide body is compared to its very end', async (t) => {
  const wide = (last: number) => [...Array.from({ length: 200_000 }, (_, i) => ({ i })), { i: last }]
  const backwards = Object.fromEntries(Array.from({ length: 50_000 }, (_, i) => [`k${50_000 - i}`, 50_000 - i]))
  const forwards = Object.fromEntries(Array.from({ length: 50_000 }, (_, i) => [`k${i + 1}`, i + 1]))
  t.equal(payload(wide(1)), payload(wide(1)))
  t.not(payload(wide(1)), payload(wide(2)))
  t.equal(payload(backwards), payload(forwards))
})

t.test('a body that is hashed a part at a time has the hash that all of it has', async (t) => {
  const rows = Array.from({ length: 5_000 }, (_, i) => ({ i, text: 'text'.repeat(i % 60), half: i / 2 }))
  // As it was computed in one piece: what is stored by one version must be the same for all.
  t.equal(payload({ rows, long: 'é'.repeat(20_000) }), '_Hmkwz5FbjWd1bctel2iea')
  // Around the size of a part: whatever stands there counts, once.
  const hashes = new Set<unknown>()
  for (let length = 8_150; length < 8_230; length++) {
    const padding = ['x'.repeat(80), 'p'.repeat(length)]
    for (const last of [1, 2, 1_000, 'y', 'y'.repeat(96), 'z'.repeat(97), [], { a: null }]) {
      const hash = payload([...padding, last])
      t.equal(payload([...padding, last]), hash)
      hashes.add(hash)
    }
  }
  t.equal(hashes.size, 80 * 8)
})

t.test('a graph that a custom parser made, with cycles everywhere, is not followed for ever', async (t) => {
  const nodes: Record<string, unknown>[] = Array.from({ length: 9 }, () => ({}))
  for (const node of nodes) for (const [i, other] of nodes.entries()) node[`n${i}`] = other
  t.equal(payload(nodes[0]), '')
})

t.test('a large tree is not taken for such a graph', async (t) => {
  const tree = () => Array.from({ length: 150_000 }, (_, i) => ({ i }))
  t.not(payload(tree()), '')
  t.equal(payload(tree()), payload(tree()))
})

// What costs more than its parsing is what is looked at again and again, or remembered for each level.
t.test(
  'each member is read once, and each object asked for its members once, however deep or wide a body is',
  async (t) => {
    const counts = { names: 0, reads: 0 }
    const counted = <T extends object>(value: T): T =>
      new Proxy(value, {
        ownKeys(target) {
          counts.names++
          return Reflect.ownKeys(target)
        },
        get(target, name) {
          if (Object.hasOwn(target, name) && name !== 'length') counts.reads++
          return Reflect.get(target, name)
        }
      })
    const deep = (levels: number) => {
      let value: unknown = 1
      for (let i = 0; i < levels; i++) value = counted(i % 2 === 0 ? { a: value, b: 0 } : [0, value])
      return value
    }
    const wide = (items: number) => counted(Array.from({ length: items }, (_, i) => counted({ b: i, a: counted([]) })))
    for (const [value, objects, reads] of [
      [deep(100), 50, 200],
      [deep(20_000), 10_000, 40_000],
      [wide(20_000), 20_000, 60_000]
    ] as const) {
      Object.assign(counts, { names: 0, reads: 0 })
      t.not(payload(value), '')
      t.same(counts, { names: objects, reads })
    }
  }
)

t.test('no two hostile bodies are taken for the same', async (t) => {
  const n = 60_000
  const many = (part: string, last: string) => `[${part.repeat(n)}${last}]`
  const deep = (open: string, close: string, leaf: string) => open.repeat(n) + leaf + close.repeat(n)
  const texts = ['0', '1', '[]', '{}', '""'].flatMap((end) => [
    many('[],', end),
    many('{},', end),
    many('[[]],', end),
    many('0,', end),
    deep('[', ']', end),
    deep('[', ',0]', end),
    deep('[', ',1]', end),
    deep('{"a":', '}', end),
    deep('{"b":', '}', end),
    deep('{"a":', ',"b":1}', end),
    deep('[{"a":', '}]', end)
  ])
  const hashes = texts.map(json)
  t.notOk(hashes.includes(''))
  t.equal(new Set(hashes).size, texts.length)
  t.equal(json(deep('{"b":1,"a":', '}', '0')), json(deep('{"a":', ',"b":1}', '0')), 'and order is nothing in them')
})
