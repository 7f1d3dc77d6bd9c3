import { createSecretKey, generateKeyPairSync, randomBytes } from 'node:crypto'
import t from 'tap'
import { PLAIN } from '../../lib/operation/hashes.js'
import { registrationOptions, routePolicy } from '../../lib/options.js'
import { hashesOf } from '../../lib/secret.js'
import { MemoryStore } from '../../lib/stores/memory/memory-store.js'

/* The option `secret`: the forms that it takes, and what is refused at boot. */

const nameUnder = (secret: unknown) => hashesOf({ secret })[0].storageKey('alice', 'k')

/** The message with which it is refused. */
function refusal(options: object): string {
  try {
    registrationOptions(options)
  } catch (error) {
    const { code, message } = error as Error & { code?: string }
    if (code === 'FST_IDEMPOTENCY_INVALID_OPTION') return message
    throw error
  }
  throw new Error('Nothing was refused')
}

t.test('left out, there is none', async (t) => {
  t.strictSame(hashesOf({}), [PLAIN])
  t.strictSame(registrationOptions({}).hashes, [PLAIN])
})

t.test('bytes, base64, base64url, hex and a KeyObject are forms of one secret', async (t) => {
  for (const size of [32, 33, 34, 48, 64]) {
    const bytes = randomBytes(size)
    const forms = [
      new Uint8Array(bytes),
      bytes.toString('base64'),
      bytes.toString('base64').replaceAll('=', ''),
      bytes.toString('base64url'),
      bytes.toString('hex'),
      bytes.toString('hex').toUpperCase(),
      createSecretKey(bytes)
    ]
    for (const form of forms) t.equal(nameUnder(form), nameUnder(bytes))
  }
})

t.test('any other text stands for itself', async (t) => {
  const text = 'correct horse battery staple, 32'
  t.equal(nameUnder(text), nameUnder(Buffer.from(text)))
  t.equal(nameUnder('ä'.repeat(16)), nameUnder(Buffer.from('ä'.repeat(16))))
})

t.test('what is changed later changes nothing', async (t) => {
  const [bytes, list] = [Buffer.alloc(32, 1), [Buffer.alloc(32, 2)]]
  const hashes = [hashesOf({ secret: bytes }), hashesOf({ secret: list })].map(([first]) => first)
  bytes.fill(9)
  list[0]?.fill(9)
  list.push(Buffer.alloc(32, 3))
  t.strictSame(
    hashes.map((of) => of.storageKey(null, 'k')),
    [1, 2].map((byte) => hashesOf({ secret: Buffer.alloc(32, byte) })[0].storageKey(null, 'k'))
  )
})

t.test('a list is in its order, and null in it stands for none', async (t) => {
  const [a, b] = [randomBytes(32), randomBytes(32)]
  const names = (secret: unknown) => hashesOf({ secret }).map((of) => of.storageKey('alice', 'k'))
  const plain = PLAIN.storageKey('alice', 'k')
  t.strictSame(names([a, b]), [nameUnder(a), nameUnder(b)])
  t.strictSame(names([b, null]), [nameUnder(b), plain])
  t.strictSame(names([null, b]), [plain, nameUnder(b)])
  t.strictSame(names([a]), [nameUnder(a)])
})

t.test('what is no secret is refused by the name of the option, and not shown', async (t) => {
  const { privateKey } = generateKeyPairSync('ed25519')
  const good = randomBytes(32)
  const wrong: [unknown, string][] = [
    ['top secret', 'got a string of 10 characters'],
    ['', 'got a string of 0 characters'],
    [good.toString('hex').slice(0, 30), 'got a string of 30 characters'],
    [good.subarray(1), 'got 31 bytes (Buffer)'],
    [new Uint8Array(31), 'got 31 bytes (Uint8Array)'],
    [new Uint16Array(32), 'got 64 bytes (Uint16Array)'],
    [createSecretKey(good.subarray(1)), 'got [SecretKeyObject'],
    [privateKey, 'got [PrivateKeyObject'],
    // What was to come from the environment.
    [undefined, 'got undefined'],
    [null, 'got null'],
    [12345678901234, 'got number'],
    [true, 'got boolean'],
    [{ secret: 'top secret' }, 'got [Object]'],
    [() => good, 'got function'],
    [[], 'got one without any'],
    [[null], 'got one without any'],
    [[good, 'top secret'], 'secret[1] is a string of 10 characters'],
    [[good, undefined], 'secret[1] is undefined'],
    [[[good]], 'secret[0] is an array of 1']
  ]
  for (const [secret, got] of wrong) {
    const message = refusal({ secret })
    const takes =
      'option "secret" takes a secret of 32 bytes or more (a text, bytes or a KeyObject), or a list of such secrets, '
    t.equal(message.slice(0, takes.length + got.length), takes + got)
    t.notMatch(message, /top secret|123456/)
  }
})

t.test('each secret is there once', async (t) => {
  const good = randomBytes(32)
  const twice = 'option "secret" takes each secret once; secret[1] is there already'
  t.equal(refusal({ secret: [good, good.toString('hex')] }), twice)
  t.equal(refusal({ secret: [null, null, good] }), twice)
})

t.test('several are refused where they could not hold what they promise', async (t) => {
  const secret = [randomBytes(32), randomBytes(32)]
  const memory = new MemoryStore()
  const four = {
    acquire: memory.acquire.bind(memory),
    renew: memory.renew.bind(memory),
    complete: memory.complete.bind(memory),
    release: memory.release.bind(memory)
  }
  const looking = { ...four, get: memory.get.bind(memory) }
  const needs = 'option "secret" takes several secrets for a store with get() and delete()'
  t.equal(refusal({ secret, store: four }), `${needs}, got Object`)
  t.equal(refusal({ secret, store: looking }), `${needs}, got Object`)
  t.ok(registrationOptions({ secret: secret[0] as Buffer, store: four }))

  const policy = (registration: object, idempotency: object) =>
    routePolicy({ method: 'POST', url: '/x', config: { idempotency } }, registrationOptions(registration))
  const refused = (idempotency: object, message: string) =>
    t.throws(() => policy({ secret }, idempotency), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message })
  refused({ store: four }, `${needs} of POST /x, got Object`)
  const store = { ...looking, delete: memory.delete.bind(memory), begin: async () => null }
  refused(
    { store, transaction: true },
    'option "secret" takes several secrets for routes without "transaction" of POST /x: what an open transaction has ' +
      'claimed under one of them cannot be seen under another'
  )
  t.ok(policy({ secret }, { store }))
  t.ok(policy({ secret: [secret[0]] }, { store, transaction: true }))
})
