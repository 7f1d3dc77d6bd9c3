import { randomUUID } from 'node:crypto'
import { FastifyAdapter, type NestFastifyApplication } from '@nestjs/platform-fastify'
import { Test } from '@nestjs/testing'
import request from 'supertest'
import { AppModule } from '../src/app.module'
import { configure } from '../src/configure'

let app: NestFastifyApplication

beforeAll(async () => {
  const testing = await Test.createTestingModule({ imports: [AppModule] }).compile()
  app = testing.createNestApplication<NestFastifyApplication>(new FastifyAdapter())
  await configure(app)
  // By itself supertest listens anew for each request, on another port: another host, and so another request (422).
  await app.listen(0, '127.0.0.1')
})

afterAll(() => app.close())

/** `undefined`: no such header. */
function charge(key: string | undefined, { account = 'alice' as string | undefined, amount = 1 as unknown } = {}) {
  const post = request(app.getHttpServer()).post('/charges').send({ amount })
  if (key !== undefined) post.set('Idempotency-Key', key)
  if (account !== undefined) post.set('Authorization', `Bearer ${account}`)
  return post
}

const count = async () => Number((await request(app.getHttpServer()).get('/charges')).text)

test('a charge that is sent again is made once, and its reply is the same', async () => {
  const key = randomUUID()
  const before = await count()
  const first = await charge(key).expect(201)
  expect(first.body).toMatchObject({ account: 'alice', amount: 1 })
  const replay = await charge(key).expect(201).expect('Idempotent-Replayed', 'true')
  expect(replay.text).toBe(first.text)
  expect(await count()).toBe(before + 1)
})

test('whoever is nobody gets a 401, even with a key that has a reply; another account has keys of its own', async () => {
  const key = randomUUID()
  await charge(key, { account: '' }).expect(401)
  const first = await charge(key).expect(201)
  await charge(key, { account: '' }).expect(401)
  const other = await charge(key, { account: 'bob' }).expect(201)
  expect(other.body.id).not.toBe(first.body.id)
})

test("a pipe's 400 is not kept: a mended body runs under the same key", async () => {
  const key = randomUUID()
  await charge(key, { amount: 'much' }).expect(400)
  await charge(key).expect(201)
})

test("the plugin's errors come with their codes", async () => {
  const key = randomUUID()
  await charge(key).expect(201)
  const reused = await charge(key, { amount: 2 }).expect(422)
  expect(reused.body).toMatchObject({ statusCode: 422, code: 'FST_IDEMPOTENCY_KEY_REUSED' })
  const missing = await charge(undefined).expect(400)
  expect(missing.body).toMatchObject({ statusCode: 400, code: 'FST_IDEMPOTENCY_KEY_MISSING' })
})
