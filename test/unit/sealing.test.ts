import { createCipheriv, createHmac, createSecretKey, randomBytes } from 'node:crypto'
import t from 'tap'
import { Keyring, Secret, secretOf } from '../../lib/stores/encrypted/sealing.js'

const keyOf = (fill: number) => createSecretKey(Buffer.alloc(32, fill))

t.test('the cipher is AES-256-GCM, under a key and a nonce by HKDF-SHA-256', (t) => {
  const [salt, about] = [Buffer.alloc(32, 9), Buffer.from('this')]
  // RFC 5869 §2, step by step: extract, then two blocks of output.
  const hmac = (key: Buffer, ...parts: (string | Buffer)[]) => {
    const made = createHmac('sha256', key)
    for (const part of parts) made.update(part)
    return made.digest()
  }
  const extracted = hmac(salt, Buffer.alloc(32, 1))
  const info = 'fastify-idempotency record'
  const first = hmac(extracted, info, Buffer.from([1]))
  const nonce = hmac(extracted, first, info, Buffer.from([2])).subarray(0, 12)
  const cipher = createCipheriv('aes-256-gcm', first, nonce).setAAD(about)
  const expected = Buffer.concat([cipher.update('secret'), cipher.final(), cipher.getAuthTag()])
  const sealed = Buffer.concat(new Secret(keyOf(1)).encrypt(Buffer.from('secret'), salt, about))
  t.equal(sealed.toString('hex'), expected.toString('hex'))
  t.end()
})

t.test('what was sealed is opened again, of any length', (t) => {
  const keyring = new Keyring([keyOf(1)])
  for (const length of [0, 1, 15, 16, 17, 1_000, 1_000_000]) {
    const plain = randomBytes(length)
    t.ok(keyring.open(keyring.seal(plain, 'this'), 'this').equals(plain), `${length} bytes`)
  }
  t.end()
})

t.test('the same sealed twice is never the same', (t) => {
  const keyring = new Keyring([keyOf(1)])
  const sealed = new Set(Array.from({ length: 1_000 }, () => keyring.seal(Buffer.from('a'), '').toString('hex')))
  t.equal(sealed.size, 1_000)
  t.end()
})

t.test('nothing is opened that was changed in any bit, cut, made longer, or is about something else', (t) => {
  const keyring = new Keyring([keyOf(1), keyOf(2)])
  const sealed = keyring.seal(Buffer.from('secret'), 'this')
  const refused = (bytes: Buffer, about = 'this') => {
    try {
      keyring.open(bytes, about)
      return false
    } catch (error) {
      return error instanceof Error && error.message.startsWith('A stored idempotency record or claim ')
    }
  }
  for (let bit = 0; bit < sealed.length * 8; bit++) {
    const damaged = Buffer.from(sealed)
    damaged[bit >> 3] = (damaged[bit >> 3] as number) ^ (1 << (bit % 8))
    if (!refused(damaged)) t.fail(`bit ${bit} flipped`)
  }
  for (let end = 0; end < sealed.length; end++) if (!refused(sealed.subarray(0, end))) t.fail(`cut to ${end}`)
  t.ok(refused(Buffer.concat([sealed, Buffer.from([0])])))
  t.ok(refused(sealed, 'that'))
  t.equal(keyring.open(sealed, 'this').toString(), 'secret', 'unchanged')
  t.end()
})

t.test('the first key seals, every key opens, and an unknown key is named', (t) => {
  const [old, current, other] = [keyOf(1), keyOf(2), keyOf(3)]
  const sealed = new Keyring([old]).seal(Buffer.from('secret'), '')
  t.equal(new Keyring([current, old]).open(sealed, '').toString(), 'secret')
  t.equal(new Keyring([other, current, old]).open(sealed, '').toString(), 'secret')
  t.throws(() => new Keyring([current]).open(sealed, ''), { message: /not among the keys \(its name is [0-9a-f]{8}\)/ })
  const renewed = new Keyring([current, old]).seal(Buffer.from('secret'), '')
  t.throws(() => new Keyring([old]).open(renewed, ''), { message: /not among the keys/ })
  t.end()
})

t.test('the name of a key stays what it is: what is stored is found by it', (t) => {
  t.equal(new Secret(keyOf(1)).name, 0xf67bab09)
  const sealed = new Keyring([keyOf(89)]).seal(Buffer.from('secret'), '')
  t.throws(() => new Keyring([keyOf(1)]).open(sealed, ''), { message: /\(its name is 03387ade\)/ })
  t.end()
})

t.test('keys that happen to share a name both open', (t) => {
  const numbered = (n: number) => {
    const bytes = Buffer.alloc(32)
    bytes.writeUInt32BE(n)
    return createSecretKey(bytes)
  }
  const [one, other] = [numbered(86_652), numbered(107_618)]
  t.equal(new Secret(one).name, new Secret(other).name)
  const keyring = new Keyring([one, other])
  for (const key of [one, other]) {
    t.equal(keyring.open(new Keyring([key]).seal(Buffer.from('secret'), ''), '').toString(), 'secret')
  }
  t.throws(() => new Keyring([one]).open(new Keyring([other]).seal(Buffer.from('secret'), ''), ''), {
    message: 'A stored idempotency record or claim is damaged, or belongs to another key'
  })
  t.end()
})

t.test('what is not of this version, or too short, is said not to be encrypted', (t) => {
  const keyring = new Keyring([keyOf(1)])
  const sealed = keyring.seal(Buffer.alloc(0), '')
  const later = Buffer.from(sealed)
  later[0] = 2
  for (const bytes of [later, sealed.subarray(0, -1), Buffer.alloc(0), Buffer.from('{"id":1}')]) {
    t.throws(() => keyring.open(bytes, ''), {
      message: 'A stored idempotency record or claim is not encrypted, or damaged'
    })
  }
  t.end()
})

t.test('a key may be bytes, base64, base64url, hex or a KeyObject, of 32 bytes', (t) => {
  const bytes = randomBytes(32)
  const base64 = bytes.toString('base64')
  const forms = [
    bytes,
    new Uint8Array(bytes),
    base64,
    base64.slice(0, -1),
    bytes.toString('base64url'),
    bytes.toString('hex'),
    bytes.toString('hex').toUpperCase(),
    createSecretKey(bytes)
  ]
  for (const form of forms) t.ok(secretOf(form)?.equals(createSecretKey(bytes)))
  const none = [
    bytes.subarray(1),
    randomBytes(33),
    createSecretKey(randomBytes(16)),
    bytes.toString('hex').slice(2),
    `a${bytes.toString('hex')}`,
    `${bytes.toString('hex')}a`,
    `*${base64}`,
    base64.slice(4),
    `${base64}=`,
    `${base64.slice(0, -1)}\n`,
    `*${base64.slice(1)}`,
    randomBytes(48).toString('base64'),
    'correct horse battery staple, 32',
    '',
    null,
    undefined,
    32,
    {},
    [...bytes]
  ]
  for (const form of none) t.equal(secretOf(form), null)
  t.end()
})
