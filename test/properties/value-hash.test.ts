import fc from 'fast-check'
import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { payloadFingerprint, payloadOfBody } from '../../lib/http/fingerprint.js'

/** JSON values of few, confusable parts: two of them are equal often enough, and nearly equal very often. */
const { value: confusable } = fc.letrec<{ value: unknown }>((tie) => ({
  value: fc.oneof(
    { maxDepth: 3, withCrossShrink: true },
    fc.constantFrom(
      ...[null, true, false, 0, -0, 1, -1, 12, 1.5, 1e21, 5e-324],
      ...['', 'a', 'b', '0', '1', 'null', 'true', '[]', '{}', '*', '#', '@0', '"', '\\', ',', ':', 'a","b', '1n'],
      ...['\ud800', '\udc00', '\ufffd', '\\ud800', 'é', 'e\u0301', '\u0000', '\u2028']
    ),
    fc.array(tie('value'), { maxLength: 3 }),
    objectOf(
      fc.constantFrom('', 'a', 'b', 'c', '1', '10', '9', '__proto__', 'constructor', 'toJSON', '"', 'a":1,"b'),
      tie
    )
  )
}))

function objectOf(names: fc.Arbitrary<string>, tie: (key: 'value') => fc.Arbitrary<unknown>): fc.Arbitrary<object> {
  const members = fc.uniqueArray(fc.tuple(names, tie('value')), { maxLength: 3, selector: ([name]) => name })
  return members.map((entries) => Object.fromEntries(entries))
}

/** Any JSON value at all. */
const any = fc.jsonValue({ maxDepth: 5, stringUnit: 'binary' })

const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null

/** What equal by value means, spelled out: -0 and 0 are the same number, the order of members is nothing. */
function equal(a: unknown, b: unknown): boolean {
  if (!isObject(a) || !isObject(b)) return a === b
  if (Array.isArray(a) !== Array.isArray(b)) return false
  const names = Object.keys(a)
  if (names.length !== Object.keys(b).length) return false
  return names.every((name) => Object.hasOwn(b, name) && equal(a[name], b[name]))
}

/** A deep copy with the members of every object in another order. */
function shuffled(value: unknown, random: () => number): unknown {
  if (Array.isArray(value)) return value.map((item) => shuffled(item, random))
  if (!isObject(value)) return value
  const entries = Object.entries(value).map(([name, member]) => [random(), name, shuffled(member, random)] as const)
  entries.sort(([a], [b]) => a - b)
  return Object.fromEntries(entries.map(([, name, member]) => [name, member]))
}

/** A deep copy in which the nth value in order, containers included, is another one. */
function changed(value: unknown, nth: number, by: unknown): unknown {
  let seen = -1
  const copy = (value: unknown): unknown => {
    if (++seen === nth) return by
    if (Array.isArray(value)) return value.map(copy)
    if (!isObject(value)) return value
    return Object.fromEntries(Object.entries(value).map(([name, member]) => [name, copy(member)]))
  }
  return copy(value)
}

/** Numbers from 0 to 1, the same for the same seed. */
function generator(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return state / 2 ** 32
  }
}

function payload(text: string): unknown {
  return payloadOfBody({ body: JSON.parse(text), headers: {} } as unknown as FastifyRequest)
}

t.test('the order of members never matters', async () => {
  fc.assert(
    fc.property(fc.oneof(any, confusable), fc.nat(), (value, seed) => {
      return payloadFingerprint(shuffled(value, generator(seed))) === payloadFingerprint(value)
    }),
    { numRuns: 1_000 }
  )
})

t.test('two values have the same hash if and only if they are equal by value', async () => {
  fc.assert(
    fc.property(confusable, confusable, (a, b) => (payloadFingerprint(a) === payloadFingerprint(b)) === equal(a, b)),
    { numRuns: 5_000 }
  )
})

t.test('a value with one change has the same hash if and only if the change is none', async () => {
  const changes = fc.tuple(fc.oneof(confusable, any), fc.nat({ max: 20 }), confusable, fc.nat())
  fc.assert(
    fc.property(changes, ([value, nth, by, seed]) => {
      const other = shuffled(changed(value, nth, by), generator(seed))
      return (payloadFingerprint(value) === payloadFingerprint(other)) === equal(value, other)
    }),
    { numRuns: 5_000 }
  )
})

t.test('the same JSON, written in another way, is the same payload', async () => {
  const texts = fc.tuple(fc.oneof(any, confusable), fc.nat(), fc.constantFrom('', ' ', '\t', '\n  '))
  fc.assert(
    fc.property(texts, ([value, seed, indent]) => {
      const text = JSON.stringify(value)
      return payload(JSON.stringify(shuffled(JSON.parse(text), generator(seed)), null, indent)) === payload(text)
    }),
    { numRuns: 1_000 }
  )
})
