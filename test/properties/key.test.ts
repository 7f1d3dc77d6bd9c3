import fc from 'fast-check'
import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { type KeyRules, keyInBody, keyInHeader, parseKey } from '../../lib/http/key.js'
import { deriveKey, storageKey } from '../../lib/operation/storage-key.js'

const RULES: KeyRules = { header: 'idempotency-key', field: 'key', keyFormat: 'any', maxKeyLength: 255 }
const UUID_V4 = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/

const printable = fc.string({ unit: 'grapheme-ascii', minLength: 1, maxLength: 255 }).filter((key) => key.trim() !== '')

/** RFC 9651 §4.1.6, the serialisation of a string. */
const quoted = (key: string) => `"${key.replaceAll(/["\\]/g, '\\$&')}"`

/** RFC 9651 §4.1.1.2, parameters in all the ways in which they may be written. */
const parameters = fc
  .array(
    fc.tuple(
      fc.constantFrom(';', '; ', ';  '),
      fc.stringMatching(/^[a-z*][a-z0-9_.*-]{0,8}$/),
      fc.oneof(
        fc.constant(''),
        fc.integer({ min: -999_999_999_999_999, max: 999_999_999_999_999 }).map((n) => `=${n}`),
        fc.stringMatching(/^-?[0-9]{1,12}\.[0-9]{1,3}$/).map((decimal) => `=${decimal}`),
        fc.string({ unit: 'grapheme-ascii' }).map((text) => `=${quoted(text)}`),
        fc.stringMatching(/^[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]{0,8}$/).map((token) => `=${token}`),
        fc.uint8Array().map((bytes) => `=:${Buffer.from(bytes).toString('base64')}:`),
        fc.constantFrom('=?0', '=?1')
      )
    ),
    { maxLength: 4 }
  )
  .map((list) => list.flat().join(''))

function inHeader(text: string): string | undefined {
  // Node hands header bytes over as Latin-1.
  const headers = { 'idempotency-key': Buffer.from(text).toString('latin1') }
  return keyInHeader({ headers } as unknown as FastifyRequest, RULES)
}

const accepted = (raw: string, rules: Partial<KeyRules> = {}): string | null => {
  try {
    return parseKey(raw, { ...RULES, ...rules })
  } catch (error) {
    if ((error as { code?: string }).code !== 'FST_IDEMPOTENCY_KEY_INVALID') throw error
    return null
  }
}

/** RFC 9651 §4.2.5, for a field that is one string and nothing else; `null` where it is none. */
function unquoted(raw: string): string | null {
  let content = ''
  for (let i = 1; i < raw.length; i++) {
    let char = raw.charAt(i)
    if (char === '"') return raw.slice(i + 1).replaceAll(' ', '') === '' ? content : null
    if (char === '\\') {
      char = raw.charAt(++i)
      if (char !== '"' && char !== '\\') return null
    } else if (char < ' ' || char > '~') {
      return null
    }
    content += char
  }
  return null
}

t.test('any printable key, quoted as RFC 9651 says, is itself, whatever parameters follow', async () => {
  fc.assert(
    fc.property(
      printable,
      parameters,
      fc.constantFrom('any' as const, 'structured' as const),
      (key, rest, keyFormat) => {
        return parseKey(inHeader(quoted(key) + rest), { ...RULES, keyFormat }) === key
      }
    ),
    { numRuns: 1_000 }
  )
})

t.test('any printable key that can do without quotes is the same with them', async () => {
  const bare = printable.filter((key) => key.trim() === key && !key.includes(',') && !key.startsWith('"'))
  fc.assert(
    fc.property(bare, (key) => parseKey(inHeader(key), RULES) === key && parseKey(inHeader(quoted(key)), RULES) === key)
  )
})

t.test('a key in a body is the same key as in a header', async () => {
  fc.assert(
    fc.property(printable, (key) => {
      const body = { key: quoted(key) }
      return parseKey(keyInBody({ body } as FastifyRequest, RULES), RULES) === parseKey(inHeader(quoted(key)), RULES)
    })
  )
})

t.test('a quoted key is accepted if and only if it is a string of RFC 9651', async () => {
  const soup = fc.string({ unit: fc.constantFrom('"', '\\', 'a', ' ', 'é', '\u007f', '\u0001', ','), maxLength: 8 })
  fc.assert(
    fc.property(soup, (text) => {
      const expected = unquoted(`"${text}`)
      return accepted(`"${text}`) === (expected?.trim() === '' ? null : expected)
    }),
    { numRuns: 5_000 }
  )
})

t.test('whatever is sent is a key within all limits, or refused with a 422', async () => {
  const anything = fc.oneof(
    fc.string({ unit: 'binary' }),
    fc.string({ unit: fc.constantFrom('"', '\\', ';', '=', 'a') })
  )
  const formats = fc.constantFrom<KeyRules['keyFormat']>('any', 'uuid', 'structured', /^a+$/, /a/)
  fc.assert(
    fc.property(anything, formats, fc.integer({ min: 1, max: 20 }), (raw, keyFormat, maxKeyLength) => {
      const key = accepted(raw, { keyFormat, maxKeyLength })
      if (key === null) return
      if (key.trim() === '') throw new Error('blank')
      if (Buffer.byteLength(key) > maxKeyLength) throw new Error('too long')
      if (keyFormat === 'structured' && !raw.trim().startsWith('"')) throw new Error('not quoted')
      if (keyFormat instanceof RegExp && key.search(keyFormat) < 0) throw new Error('of another form')
    }),
    { numRuns: 2_000 }
  )
})

t.test('of all UUIDs only those of versions 4 and 7 pass, in lower case', async () => {
  for (const version of [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] as const) {
    fc.assert(
      fc.property(fc.uuid({ version }), fc.boolean(), (uuid, upper) => {
        const key = upper ? uuid.toUpperCase() : uuid
        return accepted(key, { keyFormat: 'uuid' }) === (version === 4 || version === 7 ? uuid : null)
      })
    )
  }
})

t.test('two storage keys are the same if and only if scope and key are', async () => {
  const text = fc.string({
    unit: fc.constantFrom('a', 'b', ',', '"', '\\', '\u0000', '\ud800', '\ufffd'),
    maxLength: 3
  })
  const scope = fc.option(fc.oneof(text, fc.constant('null')))
  fc.assert(
    fc.property(scope, text, scope, text, (scopeA, keyA, scopeB, keyB) => {
      const same = scopeA === scopeB && keyA === keyB
      return (storageKey(scopeA, keyA) === storageKey(scopeB, keyB)) === same
    }),
    { numRuns: 5_000 }
  )
})

t.test('a derived key is a UUID of version 4, the same each time, and another for another label', async () => {
  const label = fc.string({ unit: 'binary', maxLength: 5 })
  fc.assert(
    fc.property(fc.string(), label, label, (key, a, b) => {
      const derived = deriveKey(storageKey(null, key), a, null)
      return UUID_V4.test(derived) && (deriveKey(storageKey(null, key), b, null) === derived) === (a === b)
    })
  )
})

t.test('any key of letters and digits is the same in a header and in a body', async () => {
  const letters = fc
    .string({ unit: 'grapheme', minLength: 1, maxLength: 20 })
    .filter((key) => /^[\p{L}\p{N}]+$/u.test(key))
  const inHeader = (key: string) => {
    const headers = { 'idempotency-key': Buffer.from(key).toString('latin1') }
    return keyInHeader({ headers } as unknown as FastifyRequest, RULES)
  }
  fc.assert(fc.property(letters, (key) => inHeader(key) === keyInBody({ body: { key } } as FastifyRequest, RULES)))
})
