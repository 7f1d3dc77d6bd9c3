import t, { type Test } from 'tap'
import { RedisStore } from '../../index.js'
import { UnreadableAnswer } from '../../lib/errors.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { StoreContext } from '../../lib/operation/store-context.js'
import type { Acquisition } from '../../types/index.js'
import { build } from '../support/app.js'
import { until } from '../support/latch.js'
import { startRedis } from '../support/redis.js'
import { claim, finish, reply, take, tombstone } from '../support/store-fixtures.js'

// What is stored in Redis was changed by something else: an operator, another program, a bad disk.

const server = await startRedis()
t.teardown(() => server.close())

const STATES = ['acquired', 'running', 'abandoned', 'completed']

async function open(t: Test) {
  const client = await server.client()
  await client.flushall()
  const store = new RedisStore(client)
  const app = await build(t, { store, fingerprint: false, scope: () => 'somebody' })
  const scene = { client, store, app, runs: 0, key: storageKey('somebody', 'key'), name: '' }
  scene.name = `idempotency:${scene.key}`
  app.post('/', { config: { idempotency: true } }, async () => {
    scene.runs++
    return 'ran'
  })
  await app.ready()
  return scene
}

type Scene = Awaited<ReturnType<typeof open>>

/** Every cut, every flipped bit, and some bytes put in. */
function* damages(value: Buffer): Generator<[what: string, damaged: Buffer]> {
  for (let end = 0; end < value.length; end++) yield [`cut to ${end}`, value.subarray(0, end)]
  for (let bit = 0; bit < value.length * 8; bit++) {
    const damaged = Buffer.from(value)
    damaged[bit >> 3] = (damaged[bit >> 3] as number) ^ (1 << (bit % 8))
    yield [`bit ${bit} flipped`, damaged]
  }
  for (const added of ['\0', '1', ']', '\xff']) {
    for (let at = 0; at <= value.length; at++) {
      const bytes = Buffer.from(added, 'latin1')
      yield [
        `${JSON.stringify(added)} put in at ${at}`,
        Buffer.concat([value.subarray(0, at), bytes, value.subarray(at)])
      ]
    }
  }
}

/** Fails unless this is an answer that every caller can handle. */
function judge(what: string, found: Acquisition | null): void {
  if (found === null) return
  let good = STATES.includes(found.state)
  if (found.state === 'acquired') good &&= Number.isInteger(found.attempt) && found.attempt > 0
  if (found.state === 'running') good &&= typeof found.fingerprint === 'string' && found.leaseMs >= 0
  if (found.state === 'abandoned') good &&= typeof found.fingerprint === 'string' && found.attempt >= 0
  if (found.state === 'completed' && found.record.kind === 'reply') {
    const { statusCode, headers, body } = found.record
    good &&= Number.isInteger(statusCode) && statusCode >= 100 && statusCode <= 999 && Buffer.isBuffer(body)
    good &&= headers.every(([name, value]) => [name, value].flat().every((part) => typeof part === 'string'))
  }
  if (!good) throw new Error(`${what}: ${JSON.stringify(found)}`)
}

/** What the store says, `null` for an error of its own. */
async function asked(what: string, ask: () => Promise<Acquisition | null>): Promise<Acquisition | null> {
  const found = await ask().catch((error) => {
    const isOwn = error instanceof Error && (error instanceof UnreadableAnswer || !(error instanceof TypeError))
    if (!isOwn) throw error
    return null
  })
  judge(what, found)
  return found
}

async function send({ app }: Scene) {
  const answer = await app.inject({ method: 'POST', url: '/', headers: { 'idempotency-key': 'key' } })
  const code = answer.headers['idempotent-replayed'] === 'true' ? 'replay' : (answer.json().code as string)
  return `${answer.statusCode} ${code}`
}

const records = {
  reply: reply({ fingerprint: '', headers: [['x-a', 'b']], body: Buffer.from('ok') }),
  tombstone: tombstone('hijacked')
}

for (const [name, record] of Object.entries(records)) {
  t.test(`a damaged ${name} is an error or well-formed, answered below 500 or with 503, and never run`, async (t) => {
    const scene = await open(t)
    const { client, store, key } = scene
    await finish(store, key, record)
    const value = (await client.getBuffer(scene.name)) as Buffer
    const answers = new Map<string, number>()
    for (const [what, damaged] of damages(value)) {
      await client.set(scene.name, damaged, 'PX', 60_000)
      const got = await asked(what, () => store.get(key))
      const acquired = await asked(what, () => store.acquire(key, claim({ takeover: true })))
      if (acquired?.state === 'acquired') t.fail(`${what}: the key was given away`)
      if ((got === null) !== (acquired === null)) t.fail(`${what}: get and acquire disagree`)
      const answer = await send(scene)
      // What the store can read and Node cannot send, such as a name of a header, is damaged as well.
      const good =
        acquired === null
          ? /^503 FST_IDEMPOTENCY_STORE_UNAVAILABLE$/
          : /^\d{3} replay$|^409 FST_IDEMPOTENCY_NOT_REPLAYABLE$|^422 FST_IDEMPOTENCY_KEY_REUSED$|^503 FST_IDEMPOTENCY_STORE_UNAVAILABLE$/
      if (!good.test(answer)) t.fail(`${what}: ${answer}`)
      answers.set(answer, (answers.get(answer) ?? 0) + 1)
    }
    t.equal(scene.runs, 0, 'the handler does not run')
    t.ok((answers.get('503 FST_IDEMPOTENCY_STORE_UNAVAILABLE') ?? 0) > value.length)
    t.comment(Object.fromEntries(answers))
    await client.set(scene.name, value)
    t.match(await send(scene), name === 'reply' ? /^201 replay/ : /^4/, 'undamaged again')
  })
}

t.test('a damaged claim is an error or well-formed, and never answered with 500', async (t) => {
  const scene = await open(t)
  const { client, store, key } = scene
  await take(store, key, { fingerprint: '' })
  const value = (await client.getBuffer(scene.name)) as Buffer
  for (const [what, damaged] of damages(value)) {
    const put = () => client.set(scene.name, damaged, 'PX', 119_000)
    await put()
    await asked(what, () => store.get(key))
    await asked(what, () => store.acquire(key, claim()))
    await put()
    const { runs } = scene
    const answer = await send(scene).catch(() => 'ran')
    // Nothing tells a claim with another time or kind from one that was written so.
    if (scene.runs === runs && !/^(503|409|422) FST_IDEMPOTENCY_/.test(answer)) t.fail(`${what}: ${answer}`)
  }
})

t.test('another version of records and claims is an error, and 503', async (t) => {
  const scene = await open(t)
  const { client, store, key } = scene
  await finish(store, key, records.reply)
  const record = (await client.getBuffer(scene.name)) as Buffer
  await client.del(scene.name)
  await take(store, key)
  const running = (await client.getBuffer(scene.name)) as Buffer
  for (const value of [record, running]) {
    for (let version = 0; version < 256; version++) {
      if (version === 0x31) continue
      const other = Buffer.from(value)
      other[1] = version
      await client.set(scene.name, other, 'PX', 119_000)
      await t.rejects(store.acquire(key, claim()), Error)
      await t.rejects(store.get(key), Error)
      if (version % 16 === 0) t.equal(await send(scene), '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE')
    }
  }
  t.equal(scene.runs, 0, 'the handler does not run')
})

t.test('a request that found a value of another type leaves nothing to be given back', async (t) => {
  const scene = await open(t)
  const { client, store, name } = scene
  let releases = 0
  const { release } = store
  store.release = (...args) => {
    releases++
    return release.apply(store, args)
  }
  await client.rpush(name, 'a')
  for (let n = 1; n <= 3; n++) {
    t.equal(await send(scene), '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE')
    await until(() => releases === n, { message: 'the claim to be given up' })
  }
  // Whoever comes next has nobody before it, which would be asked for again and again.
  await StoreContext.of(store).giveBack('another', 'token', 60_000, true)
  t.equal(releases, 4, 'each was asked for once')
})

t.test('a value of any other type under the key is an error, and 503, and is left as it is', async (t) => {
  const scene = await open(t)
  const { client, store, key, name } = scene
  const types = {
    list: () => client.rpush(name, 'C1', 'b'),
    hash: () => client.hset(name, 'C1', 'b'),
    set: () => client.sadd(name, 'C1'),
    zset: () => client.zadd(name, 1, 'C1'),
    stream: () => client.xadd(name, '*', 'C1', 'b')
  }
  for (const [type, put] of Object.entries(types)) {
    await client.del(name)
    await put()
    await t.rejects(store.acquire(key, claim({ takeover: true })), /WRONGTYPE/, type)
    await t.rejects(store.get(key), /WRONGTYPE/, type)
    t.equal(await send(scene), '503 FST_IDEMPOTENCY_STORE_UNAVAILABLE', type)
    t.equal(await client.type(name), type)
  }
  t.equal(scene.runs, 0, 'the handler does not run')
})
