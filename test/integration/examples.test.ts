import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Validator } from '@seriousme/openapi-schema-validator'
import t, { type Test } from 'tap'
import { buildApp } from '../../examples/app.js'
import { encrypted } from '../../examples/encrypted-store.js'
import { buildDocumentedApp } from '../../examples/openapi.js'
import { drain, enqueue } from '../../examples/outbox.js'
import { MemoryStore, type StoredRecord } from '../../index.js'
import { idempotentFetch } from '../../lib/client.js'
import { build, inject, REPLAYED } from '../support/app.js'

/* The examples that are not servers or neighbours: those are tried in `example.test.ts`, and in `interop/`. */

// The compiled file is in .build/test/integration.
const root = new URL('../../../', import.meta.url)

t.test('each example is run by a test', async (t) => {
  const tests = await readdir(new URL('test/', root), { recursive: true })
  const sources = await Promise.all(
    tests.filter((file) => file.endsWith('.test.ts')).map((file) => readFile(new URL(`test/${file}`, root), 'utf8'))
  )
  // Folders: demo/ is in a browser test, observability/ in that of Prometheus, nest/ in scripts/check-package.mjs.
  const entries = await readdir(new URL('examples/', root), { withFileTypes: true })
  const examples = entries.filter((entry) => entry.isFile()).map(({ name }) => name)
  t.ok(examples.length > 0)
  // What another example is made of is run with it.
  const others = await Promise.all(examples.map((file) => readFile(new URL(`examples/${file}`, root), 'utf8')))
  for (const file of examples) {
    const name = file.replace(/\.ts$/, '.js')
    const used = sources.some((source) => source.includes(`examples/${name}'`))
    t.ok(used || others.some((source) => source.includes(`from './${name}'`)), `${file} is used by a test`)
  }
})

t.test('the document of the OpenAPI example is valid, and tells of the key and of the plugin errors', async (t) => {
  const app = await buildDocumentedApp()
  t.teardown(() => app.close())
  const document = (await app.inject('/openapi.json')).json()
  t.ok((await new Validator().validate(structuredClone(document))).valid)
  const { parameters, responses } = document.paths['/refunds'].post
  t.match(parameters, [{ in: 'header', name: 'Idempotency-Key', required: true, schema: { format: 'uuid' } }])
  for (const status of ['400', '409', '422', '503']) t.ok(responses[status], `${status} is documented`)
})

t.test('the encrypted store replays, keeps nothing readable, and goes on when secrets are rotated', async (t) => {
  const [old, fresh] = [1, 2].map((byte) => Buffer.alloc(32, byte).toString('base64'))
  const kept: StoredRecord[] = []
  class Watched extends MemoryStore {
    override complete(...args: Parameters<MemoryStore['complete']>): ReturnType<MemoryStore['complete']> {
      kept.push(args[2])
      return super.complete(...args)
    }
  }
  const store = new Watched()
  const serve = async (secrets: string) => {
    const app = await build(t, { store: encrypted(store, secrets) })
    app.post('/', { config: { idempotency: true } }, async () => ({ card: '4242' }))
    return inject(app, { method: 'POST', url: '/', headers: { 'idempotency-key': 'k' }, payload: {} })
  }
  t.notOk((await serve(`${old}`)).headers[REPLAYED])
  t.equal(kept.length, 1)
  t.notMatch(
    JSON.stringify(kept, (_name, value) => (value?.type === 'Buffer' ? `${Buffer.from(value.data)}` : value)),
    /4242/
  )
  for (const secrets of [`${old},${fresh}`, `${fresh},${old}`]) {
    const replay = await serve(secrets)
    t.equal(replay.headers[REPLAYED], 'true')
    t.same(replay.json(), { card: '4242' })
  }
  t.equal((await serve(`${fresh}`)).statusCode, 503, 'without its secret a reply cannot be read')
  t.throws(() => encrypted(store, undefined), /IDEMPOTENCY_SECRETS/)
})

async function folder(t: Test): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'outbox-'))
  t.teardown(() => rm(path, { recursive: true, force: true }))
  return path
}

t.test('the outbox keeps what has no answer, and sends it again with its own key: one charge', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/charges`
  const outbox = await folder(t)
  const key = await enqueue(outbox, { amount: 7, currency: 'EUR' })
  const deaf = idempotentFetch({
    maxAttempts: 1,
    fetch: async (request) => {
      await (await fetch(request)).arrayBuffer()
      throw new TypeError('the reply was lost')
    }
  })
  t.same(await drain(outbox, url, deaf), [{ key, status: null }])
  t.same(await drain(outbox, url), [{ key, status: 201 }])
  t.same(await drain(outbox, url), [], 'nothing is left')
  t.same((await app.inject('/balance')).json(), { charges: 1, total: 7, sum: 0 })
})

t.test('the outbox drops what is refused for good', async (t) => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/charges`
  const outbox = await folder(t)
  const key = await enqueue(outbox, { amount: -1, currency: 'EUR' })
  t.same(await drain(outbox, url), [{ key, status: 400 }])
  t.same(await readdir(outbox), [])
})
