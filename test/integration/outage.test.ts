import { Writable } from 'node:stream'
import t from 'tap'
import { type IdempotencyStore, MemoryStore } from '../../index.js'
import { build, codeOf, inject, REPLAYED } from '../support/app.js'
import { latch, until } from '../support/latch.js'

/* A store that is known to be down: nobody waits for it, one at a time finds out that it is back, and the log has one error. */

const send = (key: string) => ({ method: 'POST' as const, url: '/', headers: { 'idempotency-key': key }, payload: {} })
const UNAVAILABLE = 'FST_IDEMPOTENCY_STORE_UNAVAILABLE'

/** A store that can fall silent. */
class SilentStore extends MemoryStore {
  isSilent = false
  readonly #back = latch()
  override acquire(...args: Parameters<IdempotencyStore['acquire']>) {
    return this.isSilent ? this.#back.promise.then(() => super.acquire(...args)) : super.acquire(...args)
  }
  override release(...args: Parameters<IdempotencyStore['release']>) {
    return this.isSilent ? this.#back.promise.then(() => super.release(...args)) : super.release(...args)
  }
  comeBack(): void {
    this.isSilent = false
    this.#back.open()
  }
}

interface Line {
  level: number
  msg: string
}

async function scene(t: { teardown(fn: () => unknown): void }, onStoreError: 'reject' | 'bypass') {
  const store = new SilentStore()
  const lines: Line[] = []
  const stream = new Writable({
    write(chunk, _encoding, done) {
      lines.push(JSON.parse(String(chunk)))
      done()
    }
  })
  const app = await build(t, { store, onStoreError, storeTimeout: 150 }, { logger: { level: 'warn', stream } })
  let runs = 0
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  const told = (msg: string) => lines.filter((line) => line.msg === msg).map(({ level }) => level)
  return { app, store, told, runs: () => runs }
}

t.test(
  'once the store is known to be down, requests get their 503 without asking it, but for one at a time',
  async (t) => {
    const { app, store, told, runs } = await scene(t, 'reject')
    await app.inject(send('before'))
    store.isSilent = true
    t.equal(codeOf(await app.inject(send('first'))), UNAVAILABLE)
    const probing = inject(app, send('probe'))
    for (let n = 0; n < 20; n++) {
      const reply = await app.inject(send(`refused ${n}`))
      t.same([reply.statusCode, codeOf(reply)], [503, UNAVAILABLE])
      t.match(reply.headers['retry-after'], /^[1-9]\d*$/)
    }
    t.equal(codeOf(await probing), UNAVAILABLE)
    t.same([told('idempotency store failed'), told('idempotency store is back')], [[50], []])
    store.comeBack()
    await until(async () => (await app.inject(send('after'))).statusCode === 200)
    t.equal((await app.inject(send('before'))).headers[REPLAYED], 'true')
    t.same([told('idempotency store failed'), told('idempotency store is back')], [[50], [40]])
    t.equal(runs(), 2)
  }
)

t.test("with 'bypass' they run unprotected meanwhile, and protected as soon as it is back", async (t) => {
  const { app, store, runs } = await scene(t, 'bypass')
  await app.inject(send('before'))
  store.isSilent = true
  t.equal((await app.inject(send('first'))).statusCode, 200)
  for (const key of ['probe', 'beside']) t.equal((await app.inject(send(key))).statusCode, 200)
  t.equal(runs(), 4)
  store.comeBack()
  await until(async () => (await app.inject(send('before'))).headers[REPLAYED] === 'true')
})

t.test(
  "a store that is full is not down, and nothing runs unprotected because of it, not even with 'bypass'",
  async (t) => {
    const app = await build(t, { store: new MemoryStore({ maxEntries: 1 }), onStoreError: 'bypass' })
    const [entered, leave] = [latch(), latch()]
    let runs = 0
    app.post('/', { config: { idempotency: true } }, async () => {
      runs++
      entered.open()
      await leave.promise
      return 'done'
    })
    const first = inject(app, send('a'))
    await entered.promise
    for (let n = 0; n < 5; n++) t.equal(codeOf(await app.inject(send('b'))), UNAVAILABLE)
    t.equal(runs, 1)
    leave.open()
    await first
    t.equal((await app.inject(send('b'))).body, 'done')
  }
)
