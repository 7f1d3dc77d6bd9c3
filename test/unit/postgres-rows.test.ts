import { createHash } from 'node:crypto'
import t from 'tap'
import {
  AS_TEXT,
  acquisitionOf,
  type FoundRow,
  type ListedRow,
  listedOf,
  messageOf,
  recordValues,
  stepValues
} from '../../lib/stores/postgres/rows.js'
import { toKey, toText } from '../../lib/stores/storable-text.js'
import type { StoredStep } from '../../types/index.js'
import { reply, tombstone } from '../support/store-fixtures.js'

const UNDECODABLE = { message: 'A stored idempotency record could not be decoded' }
const sha256 = (text: string) => createHash('sha256').update(text).digest('hex')

const row = (members: Partial<FoundRow>): FoundRow => ({
  found: 'completed',
  attempt: '1',
  fingerprint: 'f',
  left_ms: '1000.5',
  created_at: '1700000000000',
  status_code: '201',
  headers: '[["a","b"],["c",["d","e"]]]',
  body: Buffer.from([0, 0xff]).toString('base64'),
  body_is_text: 'f',
  tombstone: null,
  steps: null,
  ...members
})

t.test('text has no NUL and no lone surrogates, and all else is as it was', async (t) => {
  t.equal(toText('plain é 🔑'), 'plain é 🔑')
  t.equal(toText('a\0b'), 'a\\0b')
  t.equal(toText('a\\b'), 'a\\\\b')
  t.equal(toText('\\0\0\\'), '\\\\0\\0\\\\')
  t.equal(toText('a\ud800b\udc00c'), 'a\ufffdb\ufffdc')
})

t.test('what was text comes back to the letter', async (t) => {
  for (const text of ['', 'a', '\0', '\\', '\\0', '\0\\', '\\\\0', 'a\nb', '\\\n', 'ab\0cd\\ef']) {
    const found = acquisitionOf(row({ found: 'running', fingerprint: toText(text) }), 1)
    t.match(found, { fingerprint: text })
    const [, , , headers] = recordValues(
      reply({
        headers: [
          [text, text],
          ['x', [text]]
        ]
      })
    )
    t.match(acquisitionOf(row({ headers: headers as string }), 1), {
      record: {
        headers: [
          [text, text],
          ['x', [text]]
        ]
      }
    })
  }
})

t.test('a key of up to 500 bytes is stored as it is, and a longer one as its hash', async (t) => {
  t.equal(toKey('k'), 'k')
  const longest = 'é'.repeat(250)
  t.equal(toKey(longest), longest)
  t.equal(toKey(`${longest}a`), `\\h${sha256(`${longest}a`)}`)
  t.not(toKey(`\\h${sha256(`${longest}a`)}`), toKey(`${longest}a`))
})

t.test('those who wait for a key are sent its hash', async (t) => {
  t.equal(messageOf('k'), sha256('k'))
  t.equal(messageOf('l'.repeat(501)), sha256(`\\h${sha256('l'.repeat(501))}`))
})

t.test('rows are read as the server wrote them', async (t) => {
  t.equal(AS_TEXT.getTypeParser()('2026-01-01'), '2026-01-01')
})

t.test('the values of a reply and of a tombstone', async (t) => {
  const body = Buffer.from('body')
  const values = recordValues(
    reply({ fingerprint: 'f\0', createdAt: 5, statusCode: 201, headers: [['a', ['b', '\0']]], body, text: true })
  )
  t.strictSame(values, ['f\\0', 5, 201, '[["a",["b","\\\\0"]]]', Buffer.from('body'), true, null])
  body.fill(0)
  t.strictSame(values[4], Buffer.from('body'), 'a copy')
  t.strictSame(recordValues({ ...tombstone('hijacked'), fingerprint: 'f', createdAt: 5 }), [
    'f',
    5,
    null,
    null,
    null,
    null,
    'hijacked'
  ])
})

t.test('what a claim has found', async (t) => {
  t.strictSame(acquisitionOf(row({ found: 'acquired', attempt: '3' }), 7), { state: 'acquired', attempt: 3 })
  t.strictSame(acquisitionOf(row({ found: 'locked' }), 7), { state: 'running', fingerprint: '', leaseMs: 7 })
  const running = { state: 'running', fingerprint: 'f', leaseMs: 1_001, attempt: 1 }
  t.strictSame(acquisitionOf(row({ found: 'running', left_ms: '1000.1' }), 7), running)
  t.strictSame(acquisitionOf(row({ found: 'running', left_ms: '-5' }), 7), { ...running, leaseMs: 0 })
  t.strictSame(acquisitionOf(row({ found: 'running', fingerprint: null }), 7), { ...running, fingerprint: '' })
  const abandoned = { state: 'abandoned', fingerprint: 'f', attempt: 2, lapsedMs: 1_000 }
  const lapsed = { attempt: '2', left_ms: '-1000.9' }
  t.strictSame(acquisitionOf(row({ found: 'abandoned', ...lapsed }), 7), abandoned)
  t.strictSame(acquisitionOf(row({ found: 'abandoned', ...lapsed, left_ms: '0.1' }), 7), { ...abandoned, lapsedMs: 0 })
  t.strictSame(acquisitionOf(row({ found: 'ended', ...lapsed }), 7), { ...abandoned, ended: true })
  for (const found of ['running', 'abandoned', 'ended'] as const) {
    for (const damage of [{ left_ms: null }, { left_ms: 'x' }, { attempt: '0' }, { attempt: null }]) {
      t.throws(() => acquisitionOf(row({ found, ...damage }), 7), UNDECODABLE, JSON.stringify(damage))
    }
  }
  t.throws(() => acquisitionOf(row({ found: 'unknown' }), 7), UNDECODABLE)
})

t.test('what is listed of a row is what is found there, without what may be large', async (t) => {
  const { headers, body, body_is_text, steps, ...common } = row({})
  const listed = (members: Partial<ListedRow>) => listedOf({ ...(common as ListedRow), key: 'a\\\\b\\0', ...members })
  const [key, fingerprint, createdAt] = ['a\\b\0', 'f', 1_700_000_000_000]
  const completed = { key, state: 'completed', fingerprint, createdAt }
  t.strictSame(listed({}), { ...completed, outcome: 201, ttlMs: 1_001 })
  t.strictSame(listed({ left_ms: null }), { ...completed, outcome: 201, ttlMs: null })
  const lost = listed({ status_code: null, tombstone: 'settled' })
  t.strictSame(lost, { ...completed, outcome: 'settled', ttlMs: 1_001 })
  t.strictSame(listed({ found: 'running' }), { key, state: 'running', fingerprint, leaseMs: 1_001, attempt: 1 })
  const ended = { key, state: 'abandoned', fingerprint, attempt: 1, ended: true, lapsedMs: 5 }
  t.strictSame(listed({ found: 'ended', left_ms: '-5' }), ended)
  t.equal(listed({ key: toKey('l'.repeat(501)) }), null, 'the key is not known')
  for (const damage of [
    { found: 'unknown' },
    { found: 'running', left_ms: null },
    { found: 'ended', attempt: '-1' },
    { created_at: 'NaN' },
    { status_code: '42' },
    { tombstone: 'x' }
  ] as const) {
    t.equal(listed(damage), null, JSON.stringify(damage))
  }
})

t.test('steps come back to the letter, in whatever state their claim is, and a record has none', async (t) => {
  const steps: StoredStep[] = [
    ['', ''],
    ['"\\\n\0', '["a","b"]\n'],
    ['\ud800', 'é🔑']
  ]
  const lines = steps.map((step) => stepValues(step)[1]).join('')
  for (const [start, line] of steps.map(stepValues)) {
    t.ok(line.startsWith(start) && line.endsWith('\n'))
    t.equal(`\n${lines}`.split(`\n${start}`).length, 2, 'no other step begins like it')
  }
  for (const found of ['acquired', 'running', 'abandoned', 'ended'] as const) {
    t.strictSame((acquisitionOf(row({ found, steps: lines }), 7) as { steps?: unknown }).steps, steps)
    t.notOk('steps' in acquisitionOf(row({ found }), 7))
  }
  for (const damaged of ['x', 'x\n', '\n', '[]\n', '["a"]\n', '["a",1]\n', '["a","b"]', `${lines}\n`]) {
    t.throws(() => acquisitionOf(row({ found: 'running', steps: damaged }), 7), UNDECODABLE, damaged)
  }
})

t.test('a stored reply comes back as it was', async (t) => {
  const record = {
    kind: 'reply',
    fingerprint: 'f',
    createdAt: 1_700_000_000_000,
    statusCode: 201,
    headers: [
      ['a', 'b'],
      ['c', ['d', 'e']]
    ],
    body: Buffer.from([0, 0xff]),
    text: false
  }
  t.strictSame(acquisitionOf(row({}), 7), { state: 'completed', record, ttlMs: 1_001 })
  t.strictSame(acquisitionOf(row({ left_ms: null }), 7), { state: 'completed', record, ttlMs: null })
  t.match(acquisitionOf(row({ left_ms: '-1' }), 7), { ttlMs: 0 })
  t.match(acquisitionOf(row({ body_is_text: 't' }), 7), { record: { text: true } })
})

t.test('a stored tombstone comes back as it was', async (t) => {
  for (const reason of ['too-large', 'stream-failed', 'hijacked'] as const) {
    const record = { kind: 'tombstone', fingerprint: 'f', createdAt: 1_700_000_000_000, reason }
    const found = row({ tombstone: reason, status_code: null, headers: null, body: null, body_is_text: null })
    t.strictSame(acquisitionOf(found, 7), { state: 'completed', record, ttlMs: 1_001 })
  }
})

t.test('a record that is not one of ours is an error', async (t) => {
  const wrong: Partial<FoundRow>[] = [
    { created_at: null },
    { created_at: 'x' },
    { tombstone: 'x' },
    { status_code: null },
    { status_code: '99' },
    { status_code: 'x' },
    { body: null },
    { body_is_text: null },
    { headers: null },
    { headers: '{' },
    { headers: '{}' },
    { headers: '[["a"]]' }
  ]
  for (const members of wrong) t.throws(() => acquisitionOf(row(members), 7), UNDECODABLE, JSON.stringify(members))
})
