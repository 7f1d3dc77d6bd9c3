import { createSecretKey } from 'node:crypto'
import t from 'tap'
import { closestDifference, composeFingerprint, difference } from '../../lib/operation/fingerprint.js'
import { KeyedHashes, PLAIN } from '../../lib/operation/hashes.js'
import { markOf } from '../../lib/operation/origin.js'
import { storageKey } from '../../lib/operation/storage-key.js'

/* What a store sees of a key, a caller and a request: with a secret, and without one. */

const under = (byte: number) => new KeyedHashes(createSecretKey(Buffer.alloc(32, byte)))
const [ours, theirs] = [under(1), under(2)]
const HEAD = `${'h'.repeat(22)}hint`
const PAYLOAD = 'p'.repeat(22)

t.test('without a secret they are what they have always been', async (t) => {
  t.equal(PLAIN.storageKey('alice', 'k'), storageKey('alice', 'k'))
  t.equal(PLAIN.mark('key', 'alice'), markOf('key', 'alice'))
  t.equal(PLAIN.fingerprint('key', HEAD, PAYLOAD), composeFingerprint(HEAD, PAYLOAD))
})

t.test('under a secret they stay what they are from version to version', async (t) => {
  const key = ours.storageKey('alice', 'k')
  t.equal(key, 'b2U3hdqyE331UaPboMonAoFnCHXYJa-GYvJcrxv1Re0')
  t.equal(ours.storageKey(null, 'k'), 'Tem-h8-RlYC8T1O9zhK-Dkt-T9-3zqnz39eGx8YM98w')
  t.equal(ours.mark(key, 'alice'), 'Mqa_8m73KQBGH1aH')
  t.equal(ours.fingerprint(key, HEAD, PAYLOAD), 'A1wjUkrdnDqfV689IpdgMmGMp1.7VOkazwgNoo_rkHpvHTanv')
})

t.test('they have the same lengths and parts as without one, and nothing else in common', async (t) => {
  const key = ours.storageKey('alice', 'k')
  t.equal(key.length, storageKey('alice', 'k').length)
  t.not(key, storageKey('alice', 'k'))
  t.equal(ours.mark(key, 'alice').length, markOf(key, 'alice').length)
  t.not(ours.mark(key, 'alice'), markOf(key, 'alice'))
  t.equal(ours.mark(key, null), '')
  const fingerprint = ours.fingerprint(key, HEAD, PAYLOAD)
  t.equal(fingerprint.length, composeFingerprint(HEAD, PAYLOAD).length)
  t.match(fingerprint, /^[\w-]{26}\.[\w-]{22}$/)
  for (const part of ['hhhh', 'hint', 'pppp']) t.notMatch(fingerprint, part)
  t.match(ours.fingerprint(key, HEAD, ''), /^[\w-]{26}\.$/, 'a payload that is not known stays so')
})

t.test('each is of its secret, of its key and of its purpose', async (t) => {
  const key = ours.storageKey('alice', 'k')
  const all = [
    key,
    theirs.storageKey('alice', 'k'),
    ours.storageKey('bob', 'k'),
    ours.storageKey(null, 'k'),
    ours.storageKey('alice', 'l'),
    ours.mark(key, 'alice'),
    theirs.mark(key, 'alice'),
    ours.mark(key, 'bob'),
    ours.mark('other', 'alice'),
    ...[ours, theirs].flatMap((hashes) => {
      const parts = ['x', 'y'].flatMap((name) => hashes.fingerprint(name, HEAD, PAYLOAD).split('.'))
      return [...parts, ...parts.map((part) => part.slice(22))].filter(Boolean)
    })
  ]
  t.equal(new Set(all).size, all.length)
})

t.test('what differs is told as without a secret, and between secrets everything does', async (t) => {
  const of = (head: string, payload: string, hashes = ours) => hashes.fingerprint('key', head, payload)
  const a = of(HEAD, PAYLOAD)
  const cases = [
    [of(HEAD, PAYLOAD), null],
    [of(HEAD, ''), null],
    [of(HEAD, 'q'.repeat(22)), 'payload'],
    [of(`${'g'.repeat(22)}hint`, PAYLOAD), 'credentials'],
    [of(`${'g'.repeat(22)}tnih`, PAYLOAD), 'target'],
    [of(HEAD, PAYLOAD, theirs), 'target']
  ] as const
  for (const [b, expected] of cases) t.equal(difference(b, a), expected)
  const both = [a, of(HEAD, PAYLOAD, theirs)]
  for (const hashes of [ours, theirs]) {
    t.equal(closestDifference(of(HEAD, PAYLOAD, hashes), both), null)
    t.equal(closestDifference(of(HEAD, 'q'.repeat(22), hashes), both), 'payload')
    t.equal(closestDifference(of(`${'g'.repeat(22)}hint`, PAYLOAD, hashes), both), 'credentials')
    t.equal(closestDifference(of(`${'g'.repeat(22)}tnih`, PAYLOAD, hashes), both), 'target')
  }
})
