/*
 * Sameness: what goes wrong in telling which requests are the same.
 *
 * guard                                            test
 * the raw key as the storage key                   the key of one caller is of no use to another
 *                                                  a caller cannot find out by a key what another is doing
 *                                                  the key of one endpoint is of no use to another
 *                                                  no text of a client reaches the store as a key
 * keys glued together                              scope and key cannot be shifted into each other, nor can a key reach into another
 * a long URL overflows the key's place             long keys, scopes and URLs are protected like short ones
 * query string ignored                             another query string is another request
 * same body refused under another key              the same body under another key is another operation
 * body and Authorization in the key                another body with the same key is seen as misuse, not run
 *                                                  a refreshed token does not make a retry run again where there is a scope
 * order of members, weak hashes, boundaries        the order of members and white space do not matter, the order of items does
 *                                                  the order of form fields does not matter, the order of values of one field does
 *                                                  bodies with the same MD5 are different requests
 *                                                  the boundary of a multipart body does not matter
 * payload hash not kept on completion              a finished operation is still compared
 * versions of UUIDs not looked at                  only a UUID of version 4 or 7 is a UUID
 * a blank key taken for none                       a blank key is refused, whether or not a key is required
 * minimum lengths                                  short keys are keys
 * structured strings not understood                a quoted key and a bare one are the same key
 */
import { createHash } from 'node:crypto'
import formbody from '@fastify/formbody'
import multipart from '@fastify/multipart'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import idempotency, {
  type Acquisition,
  type Claim,
  type IdempotencyOptions,
  type IdempotencyRouteOptions
} from '../../index.js'
import { isReplay, type Post, post } from '../interop/kit.js'
import { latch, listening, until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { Delegate, kinds, redisStore, serve } from './kit.js'

const redis = await startRedis()
t.teardown(() => redis.close())

/** Sends requests that each should run, replay or be refused, in turn. */
async function counting(t: Test, options: IdempotencyOptions = {}) {
  let runs = 0
  const app = await serve(t, options, async () => ({ run: ++runs }))
  const outcome = async (request: Post) => {
    const before = runs
    const reply = await post(app, request)
    if (reply.statusCode !== 200) return `${reply.statusCode} ${reply.json().code}`
    if (runs > before) return 'run'
    return isReplay(reply) ? `replay of ${reply.json().run}` : 'neither'
  }
  return { app, outcome, runs: () => runs }
}

const REUSED = '422 FST_IDEMPOTENCY_KEY_REUSED'
const INVALID = '422 FST_IDEMPOTENCY_KEY_INVALID'

t.test('the key of one caller is of no use to another', async (t) => {
  for (const { fresh } of kinds(redis)) {
    const alice = { authorization: 'Bearer alice' }
    const bob = { authorization: 'Bearer bob' }

    const unscoped = await counting(t, { store: await fresh()() })
    t.equal(await unscoped.outcome({ key: 'key', headers: alice }), 'run')
    t.equal(await unscoped.outcome({ key: 'key', headers: bob }), REUSED)
    t.equal(await unscoped.outcome({ key: 'key' }), REUSED)
    t.equal(await unscoped.outcome({ key: 'key', headers: alice }), 'replay of 1')

    const scoped = await counting(t, {
      store: await fresh()(),
      scope: ({ headers }) => String(headers.authorization)
    })
    t.equal(await scoped.outcome({ key: 'key', headers: alice }), 'run')
    t.equal(await scoped.outcome({ key: 'key', headers: bob }), 'run')
    t.equal(await scoped.outcome({ key: 'key', headers: alice }), 'replay of 1')
    t.equal(await scoped.outcome({ key: 'key', headers: bob }), 'replay of 2')
  }
})

t.test('a caller cannot find out by a key what another is doing', async (t) => {
  const goOn = latch()
  let runs = 0
  const app = await serve(t, {}, async () => {
    runs++
    await goOn.promise
    return 'private'
  })
  const alice = { authorization: 'Bearer alice' }
  const first = post(app, { key: 'key', headers: alice }).then((reply) => reply)
  await until(() => runs === 1)
  t.equal((await post(app, { key: 'key', headers: alice })).statusCode, 409)
  t.equal((await post(app, { key: 'key', headers: { authorization: 'Bearer bob' } })).statusCode, 422)
  goOn.open()
  await first
})

t.test('the key of one endpoint is of no use to another', async (t) => {
  for (const options of [{}, { scope: () => 'somebody' }]) {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(idempotency, options)
    let runs = 0
    const config = { idempotency: true }
    for (const url of ['/a', '/b/:id']) {
      app.route({ method: ['POST', 'PUT'], url, config, handler: async () => ({ url, run: ++runs }) })
    }
    t.equal((await post(app, { url: '/a', key: 'key' })).statusCode, 200)
    t.equal((await post(app, { url: '/b/1', key: 'key' })).statusCode, 422)
    t.equal((await post(app, { url: '/b/1', key: 'other' })).statusCode, 200)
    t.equal((await post(app, { url: '/b/2', key: 'other' })).statusCode, 422)
    const headers = { 'idempotency-key': 'key' }
    t.equal((await app.inject({ method: 'PUT', url: '/a', headers, payload: {} })).statusCode, 422)
    t.equal(runs, 2)
  }
})

t.test('no text of a client reaches the store as a key', async (t) => {
  const client = await redis.client()
  const keyPrefix = 'hashed:'
  let scope = ''
  const app = await serve(t, { store: redisStore(client, keyPrefix), scope: () => scope }, async () => 'done')
  const nasty = ['jane@example.com', '*', '../../x', `a\\\\b`, 'hashed:', '世界', 'x'.repeat(255), '{slot}']
  for (const text of nasty) {
    scope = text
    await post(app, { key: text.replace('世界', Buffer.from('世界').toString('latin1')) })
  }
  const keys = await client.keys(`${keyPrefix}*`)
  t.equal(keys.length, nasty.length)
  for (const key of keys) t.match(key, /^hashed:[\w-]{43}$/)
})

t.test('scope and key cannot be shifted into each other, nor can a key reach into another', async (t) => {
  for (const { fresh } of kinds(redis)) {
    let scope: string | null = null
    const { app, runs } = await counting(t, { store: await fresh()(), scope: () => scope as string })
    const pairs = [
      ['ab', 'c'],
      ['a', 'bc'],
      ['a:b', 'c'],
      ['a', 'b:c'],
      ['a","b', 'c'],
      ['a', 'b,c'],
      ['["a"', 'c'],
      ['abc', 'k'],
      ['abc', 'kstatus-code'],
      ['abc', 'k:status'],
      ['abc', 'k\\0']
    ] as const
    for (const [user, key] of pairs) {
      scope = user
      t.equal((await post(app, { key: JSON.stringify(key) })).statusCode, 200, `${user} and ${key}`)
    }
    t.equal(runs(), pairs.length)
  }
})

t.test('long keys, scopes and URLs are protected like short ones', async (t) => {
  for (const { fresh } of kinds(redis)) {
    const { outcome } = await counting(t, { store: await fresh()(), scope: () => 'x'.repeat(10_000) })
    const url = `/?q=${'x'.repeat(8_000)}`
    t.equal(await outcome({ key: 'k'.repeat(255), url }), 'run')
    t.equal(await outcome({ key: 'k'.repeat(255), url }), 'replay of 1')
    t.equal(await outcome({ key: 'k'.repeat(255), url: `${url}y` }), REUSED, 'the end of the URL counts as well')
    t.equal(await outcome({ key: `${'k'.repeat(254)}l`, url }), 'run', 'and so does the end of the key')
    t.equal(await outcome({ key: 'k'.repeat(256), url }), INVALID, 'what is too long is refused, not cut')
  }
})

t.test('another query string is another request', async (t) => {
  for (const options of [{}, { scope: () => 'somebody' }, { fingerprint: false }] as const) {
    const { outcome } = await counting(t, options)
    t.equal(await outcome({ key: 'key', url: '/?to=alice' }), 'run')
    t.equal(await outcome({ key: 'key', url: '/?to=mallory' }), REUSED)
    t.equal(await outcome({ key: 'key', url: '/' }), REUSED)
    t.equal(await outcome({ key: 'key', url: '/?to=alice' }), 'replay of 1')
  }
})

t.test('the same body under another key is another operation', async (t) => {
  const { outcome } = await counting(t, { scope: ({ headers }) => String(headers['x-user']) })
  const payload = { item: 1 }
  t.equal(await outcome({ key: 'one', headers: { 'x-user': 'alice' }, payload }), 'run')
  t.equal(await outcome({ key: 'two', headers: { 'x-user': 'alice' }, payload }), 'run')
  t.equal(await outcome({ key: 'three', headers: { 'x-user': 'bob' }, payload }), 'run')
})

t.test('another body with the same key is seen as misuse, not run', async (t) => {
  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
    const { outcome } = await counting(t, { hook })
    t.equal(await outcome({ key: 'key', payload: { amount: 1 } }), 'run')
    t.equal(await outcome({ key: 'key', payload: { amount: 2 } }), REUSED)
    t.equal(await outcome({ key: 'key', payload: { amount: 1 } }), 'replay of 1')
  }
})

t.test('a refreshed token does not make a retry run again where there is a scope', async (t) => {
  const { outcome } = await counting(t, { scope: () => 'alice' })
  t.equal(await outcome({ key: 'key', headers: { authorization: 'Bearer old' } }), 'run')
  t.equal(await outcome({ key: 'key', headers: { authorization: 'Bearer new' } }), 'replay of 1')
})

t.test('the order of members and white space do not matter, the order of items does', async (t) => {
  const { outcome } = await counting(t)
  const json = (payload: string) => ({ key: 'key', headers: { 'content-type': 'application/json' }, payload })
  t.equal(await outcome(json('{"a":1,"b":{"c":[1,2],"d":null}}')), 'run')
  t.equal(await outcome(json('{"b":{"d":null,"c":[1,2]},"a":1}')), 'replay of 1')
  t.equal(await outcome(json(' { "a" : 1.0, "b":\n{"c":[1,2 ],"d":null} }\t')), 'replay of 1')
  for (const other of [
    '{"a":1,"b":{"c":[2,1],"d":null}}',
    '{"a":"1","b":{"c":[1,2],"d":null}}',
    '{"a":1,"b":{"c":[1,2]}}',
    '{"a":1,"b":{"c":[1,2],"d":"null"}}',
    '{"a":1,"b":{"c":[[1,2]],"d":null}}',
    '{"a":1,"b":{"c":"[1,2]","d":null}}'
  ]) {
    t.equal(await outcome(json(other)), REUSED, other)
  }
})

t.test('the order of form fields does not matter, the order of values of one field does', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  await app.register(formbody)
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  const send = (payload: string) =>
    post(app, { key: 'key', headers: { 'content-type': 'application/x-www-form-urlencoded' }, payload })
  t.equal((await send('a=1&b=2&b=3')).statusCode, 200)
  t.ok(isReplay(await send('b=2&a=1&b=3')))
  t.equal((await send('a=1&b=3&b=2')).statusCode, 422)
})

/** Two blocks with the MD5 79054025255fb1a26e4bc422aef54eb4 (Wang and others, 2004). */
const collision = ['87', '07'].map((x) => {
  const [y, z] = x === '87' ? ['71', 'f2'] : ['f1', '72']
  const [u, v] = x === '87' ? ['b4', 'a8'] : ['34', '28']
  return Buffer.from(
    `d131dd02c5e6eec4693d9a0698aff95c2fcab5${x}12467eab4004583eb8fb7f89` +
      `55ad340609f4b30283e4888325${y}415a085125e8f7cdc99fd91dbd${z}80373c5b` +
      `d8823e3156348f5bae6dacd436c919c6dd53e2${u}87da03fd02396306d248cda0` +
      `e99f33420f577ee8ce54b67080${v}0d1ec69821bcb6a8839396f965${x === '87' ? '2b' : 'ab'}6ff72a70`,
    'hex'
  )
})

t.test('bodies with the same MD5 are different requests', async (t) => {
  const md5 = (data: Buffer) => createHash('md5').update(data).digest('hex')
  const [one, two] = collision as [Buffer, Buffer]
  t.not(one.toString('hex'), two.toString('hex'))
  t.equal(md5(one), md5(two))
  const app = Fastify()
  t.teardown(() => app.close())
  app.addContentTypeParser('application/octet-stream', { parseAs: 'buffer' }, (_request, body, done) =>
    done(null, body)
  )
  await app.register(idempotency)
  const byRoute: Record<string, IdempotencyRouteOptions> = {
    '/body': {},
    '/function': { fingerprint: (request) => request.body as Buffer }
  }
  for (const [url, idempotency] of Object.entries(byRoute))
    app.post(url, { config: { idempotency } }, async () => 'done')
  for (const url of Object.keys(byRoute)) {
    const send = (payload: Buffer) =>
      post(app, { url, key: url, headers: { 'content-type': 'application/octet-stream' }, payload })
    t.equal((await send(one)).statusCode, 200)
    t.equal((await send(two)).statusCode, 422)
    t.ok(isReplay(await send(one)))
  }
})

t.test('the boundary of a multipart body does not matter', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(idempotency)
  await app.register(multipart, { attachFieldsToBody: 'keyValues' })
  app.post('/', { config: { idempotency: true } }, async () => 'done')
  const url = await listening(app)
  const send = (content: string) => {
    const body = new FormData()
    body.append('file', new Blob([content]), 'a.bin')
    return fetch(url, { method: 'POST', headers: { 'idempotency-key': 'key' }, body })
  }
  t.equal((await send('content')).status, 200)
  t.equal((await send('content')).headers.get('idempotent-replayed'), 'true')
  t.equal((await send('Content')).status, 422)
})

t.test('a finished operation is still compared', async (t) => {
  for (const { name, fresh } of kinds(redis)) {
    for (const onConflict of ['reject', 'wait'] as const) {
      const claims: Claim[] = []
      class Spy extends Delegate {
        override acquire(key: string, claim: Claim): Promise<Acquisition> {
          claims.push(claim)
          return super.acquire(key, claim)
        }
      }
      const { app, outcome } = await counting(t, { store: new Spy(await fresh()()), onConflict })
      t.equal(await outcome({ key: 'key', payload: { amount: 1 } }), 'run')
      const found = (await app.idempotency.get('key')) as { record: { fingerprint: string } }
      t.ok(found.record.fingerprint.startsWith(claims[0]?.fingerprint ?? 'nothing'), name)
      t.equal(await outcome({ key: 'key', payload: { amount: 1 } }), 'replay of 1')
      t.equal(await outcome({ key: 'key', payload: { amount: 2 } }), REUSED)
    }
  }
})

t.test('only a UUID of version 4 or 7 is a UUID', async (t) => {
  const { outcome } = await counting(t, { keyFormat: 'uuid' })
  t.equal(await outcome({ key: '0b7c7d3e-5a51-4f0e-9d6b-8f3a52d7c9ab' }), 'run')
  t.equal(await outcome({ key: '"7A4F2E88-1C0D-4B9A-8E57-D2F1C3B4A596"' }), 'run')
  t.equal(await outcome({ key: '7a4f2e88-1c0d-4b9a-8e57-d2f1c3b4a596' }), 'replay of 2', 'letter case is nothing')
  t.equal(await outcome({ key: '018c2b65-6b0a-7e35-9f1a-9c3d7f0a1b2c' }), 'run', 'version 7')
  for (const key of [
    '5c9ab3f8-8a0f-11ee-b9d1-0242ac120002', // version 1
    '6fa459ea-ee8a-3ca4-894e-db77e160355e', // version 3
    '018c2b65-6b0a-8e35-9f1a-9c3d7f0a1b2c', // version 8
    '018c2b65-6b0a-7e35-cf1a-9c3d7f0a1b2c', // version 7, another variant
    '00000000-0000-0000-0000-000000000000',
    '0b7c7d3e-5a51-4f0e-cd6b-8f3a52d7c9ab', // another variant
    '0b7c7d3e5a514f0e9d6b8f3a52d7c9ab',
    '0b7c7d3e-5a51-4f0e-9d6b-8f3a52d7c9abc',
    'x0b7c7d3e-5a51-4f0e-9d6b-8f3a52d7c9ab'
  ]) {
    t.equal(await outcome({ key }), INVALID, key)
  }
})

t.test('a blank key is refused, whether or not a key is required', async (t) => {
  for (const required of [true, false]) {
    const { outcome, runs } = await counting(t, { required })
    for (const key of ['', ' ', '\t', '""', '"  "']) t.equal(await outcome({ key }), INVALID, JSON.stringify(key))
    t.equal(runs(), 0)
  }
})

t.test('short keys are keys', async (t) => {
  const { outcome } = await counting(t)
  for (const [i, key] of ['1', 'ab', '9f86d081884c7d65', 'n4bQgYhMfWU'].entries()) {
    t.equal(await outcome({ key }), 'run', key)
    t.equal(await outcome({ key }), `replay of ${i + 1}`)
  }
})

t.test('a quoted key and a bare one are the same key', async (t) => {
  const { app, outcome } = await counting(t)
  t.equal(await outcome({ key: '"abc"' }), 'run')
  for (const key of ['abc', '"abc"', '"abc";v=1', '"abc"; a; b="x,y"', ' "abc" ', '"abc", "abc"', 'abc, abc']) {
    t.equal(await outcome({ key }), 'replay of 1', key)
  }
  t.equal(await outcome({ key: '"a\\"b\\\\c"' }), 'run')
  t.ok(await app.idempotency.get('a"b\\c'))
  for (const key of ['"abc', '"abc"x', '"abc", "abd"', '"a\\bc"', 'abc, abd'])
    t.equal(await outcome({ key }), INVALID, key)
})
