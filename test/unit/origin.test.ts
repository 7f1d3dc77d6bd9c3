import t from 'tap'
import { markOf, originOf, withOrigin, withoutOrigin } from '../../lib/operation/origin.js'

/* What a claim and a record say of themselves, behind what is compared of them. */

const ORIGIN = { startedAt: 1_764_000_000_123, caller: 'mark', route: '/orders/:id' }

t.test('a stored fingerprint gives back what is compared, and where it comes from', (t) => {
  for (const fingerprint of ['head.payload', 'head.', '']) {
    for (const route of ['/orders/:id', '/~user/:name~', 'run', '', '*']) {
      for (const caller of ['mark', '']) {
        const stored = withOrigin(fingerprint, { ...ORIGIN, caller, route })
        t.equal(withoutOrigin(stored), fingerprint)
        t.strictSame(originOf(stored), { ...ORIGIN, caller, route })
      }
    }
  }
  t.end()
})

t.test('a fingerprint that says nothing of itself is compared as it is', (t) => {
  for (const stored of ['', 'head.payload', 'whatever another has written']) {
    t.equal(withoutOrigin(stored), stored)
    t.equal(originOf(stored), null)
  }
  for (const stored of ['head.payload~', '~1~2', 'head.payload~!~mark~/orders']) t.equal(originOf(stored), null)
  t.end()
})

t.test('a mark tells the keys of a scope to who knows it, and nothing to others', (t) => {
  t.equal(markOf('key', 'alice'), markOf('key', 'alice'))
  const marks = [markOf('key', 'alice'), markOf('key', 'bob'), markOf('other', 'alice'), markOf('other', 'bob')]
  t.equal(new Set(marks).size, marks.length)
  for (const mark of marks) t.match(mark, /^[\w-]{16}$/)
  t.equal(markOf('key', null), '')
  t.end()
})
