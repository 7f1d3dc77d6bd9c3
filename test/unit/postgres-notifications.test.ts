import { EventEmitter, getEventListeners } from 'node:events'
import t from 'tap'
import { PostgresNotifications } from '../../lib/stores/postgres/notifications.js'
import type { PostgresPool } from '../../lib/stores/postgres/pool.js'
import { messageOf } from '../../lib/stores/postgres/rows.js'
import { settle, waiter } from '../support/waiter.js'

type Step = 'connect' | 'listen' | 'end'

/** A client of `pg` that fails or hangs where it is told to. */
class Client extends EventEmitter {
  readonly calls: string[] = []
  destroyed = false
  readonly connection = {
    stream: {
      destroy: () => {
        this.destroyed = true
      }
    }
  }
  readonly options: object
  readonly #does: (step: Step) => Promise<void>

  constructor(options: object, does: (step: Step) => Promise<void>) {
    super()
    this.options = options
    this.#does = does
  }

  connect(): Promise<void> {
    this.calls.push('connect')
    return this.#does('connect')
  }

  query(text: string): Promise<void> {
    this.calls.push(text)
    return this.#does('listen')
  }

  end(): Promise<void> {
    this.calls.push('end')
    return this.#does('end')
  }
}

function open() {
  const clients: Client[] = []
  const does: Record<Step, () => Promise<void>> = {
    connect: async () => {},
    listen: async () => {},
    end: async () => {}
  }
  const options = { host: 'here' }
  const pool = {
    options,
    Client: class extends Client {
      constructor(options: object) {
        super(options, (step) => does[step]())
        clients.push(this)
      }
    }
  }
  const notifications = new PostgresNotifications(pool as unknown as PostgresPool)
  const wait = (key: string, { watch = async () => true, signal = new AbortController().signal } = {}) =>
    waiter(notifications.changed(key, watch, signal), signal)
  const notify = (key: string) => clients.at(-1)?.emit('notification', { payload: messageOf(key) })
  return { clients, does, notifications, notify, options, wait }
}

const states = (waiters: { is: string }[]) => waiters.map(({ is }) => is)
const down = () => Promise.reject(new Error('down'))
const never = () => new Promise<void>(() => {})

t.test('all who wait share one connection, of the pool but not one of its own', async (t) => {
  const { clients, options, wait } = open()
  wait('a')
  wait('a')
  wait('b')
  await settle()
  t.equal(clients.length, 1)
  t.equal(clients[0]?.options, options)
  t.match(clients[0]?.calls, ['connect', /^LISTEN "[\w-]+"$/])
})

t.test('a message wakes all who wait for the key, and nobody else', async (t) => {
  const { clients, notify, wait } = open()
  const waiters = [wait('a'), wait('a'), wait('b')]
  await settle()
  notify('c')
  clients[0]?.emit('notification', {})
  await settle()
  t.same(states(waiters), ['waiting', 'waiting', 'waiting'])
  notify('a')
  await settle()
  t.same(states(waiters), ['woken', 'woken', 'waiting'])
})

t.test('nobody looks before the connection listens, and who finds that all is over does not wait', async (t) => {
  const { does, wait } = open()
  let listening = () => {}
  does.listen = () => new Promise((resolve) => (listening = resolve))
  let looked = 0
  const waiter = wait('a', { watch: async () => ++looked === 0 })
  await settle()
  t.same([looked, waiter.is], [0, 'waiting'])
  listening()
  await settle()
  t.same([looked, waiter.is], [1, 'woken'])
})

t.test('a message that comes while somebody looks is not missed, nor is a signal', async (t) => {
  const { notify, wait } = open()
  const controller = new AbortController()
  const watch = () => new Promise<boolean>(() => {})
  const waiters = [wait('a', { watch }), wait('b', { watch, signal: controller.signal })]
  await settle()
  notify('a')
  controller.abort()
  await settle()
  t.same(states(waiters), ['woken', 'woken'])
})

t.test('who does not want to wait any more does not connect, nor look', async (t) => {
  const { clients, does, wait } = open()
  t.equal(wait('a', { signal: AbortSignal.abort() }).is, 'waiting')
  await settle()
  t.equal(clients.length, 0)
  does.listen = never
  const controller = new AbortController()
  let looked = 0
  const leaver = wait('a', { watch: async () => ++looked > 0, signal: controller.signal })
  controller.abort()
  await settle()
  t.same([looked, leaver.is], [0, 'woken'])
})

t.test('one who leaves takes nobody along, and leaves no listener behind', async (t) => {
  const { notify, wait } = open()
  const controller = new AbortController()
  const leaver = wait('a', { signal: controller.signal })
  const other = wait('a')
  await settle()
  controller.abort()
  await settle()
  t.same(states([leaver, other]), ['woken', 'waiting'])
  t.equal(getEventListeners(leaver.signal, 'abort').length, 0)
  notify('a')
  await settle()
  t.equal(other.is, 'woken')
  t.equal(getEventListeners(other.signal, 'abort').length, 0)
})

t.test('when the connection is lost all look again, and the next who waits opens another', async (t) => {
  for (const event of ['error', 'end']) {
    const { clients, notify, wait } = open()
    const waiters = [wait('a'), wait('b')]
    await settle()
    clients[0]?.emit(event, new Error('reset'))
    const anew = wait('a')
    await settle()
    t.same(states(waiters), ['woken', 'woken'])
    t.equal(clients.length, 2)
    clients[0]?.emit('end')
    await settle()
    t.equal(anew.is, 'waiting', 'the old connection is of no account any more')
    notify('a')
    await settle()
    t.equal(anew.is, 'woken')
  }
})

t.test('a connection that fails is an error for those who wait, and none is tried for a second', async (t) => {
  for (const step of ['connect', 'listen'] as const) {
    let now = 1_000_000
    t.intercept(performance, 'now', { value: () => now })
    const { clients, does, wait } = open()
    does[step] = down
    does.end = down
    const waiters = [wait('a'), wait('a')]
    await settle()
    t.same(states(waiters), ['failed', 'failed'])
    t.match(clients[0]?.calls.at(-1), 'end')
    does[step] = async () => {}
    now += 999
    const early = wait('a')
    await settle()
    t.same([early.is, clients.length], ['failed', 1])
    now += 1
    const later = wait('a')
    await settle()
    t.same([later.is, clients.length], ['waiting', 2])
  }
})

t.test('an error on the way to a connection is that of the connection, once', async (t) => {
  const { clients, does, wait } = open()
  let fail = (_error: Error) => {}
  does.connect = () => new Promise((_resolve, reject) => (fail = reject))
  const waiter = wait('a')
  await settle()
  clients[0]?.emit('error', new Error('refused'))
  await settle()
  t.equal(waiter.is, 'waiting', 'the connection itself will say so')
  fail(new Error('refused'))
  await settle()
  t.equal(waiter.is, 'failed')
})

t.test('closing wakes all and ends the connection, and may be done with none', async (t) => {
  const { clients, does, notifications, wait } = open()
  await notifications.close()
  const waiters = [wait('a'), wait('b')]
  await settle()
  does.end = down
  await notifications.close()
  await settle()
  t.same(states(waiters), ['woken', 'woken'])
  t.equal(clients[0]?.calls.at(-1), 'end')
  t.equal(clients[0]?.destroyed, true)
  clients[0]?.emit('end')
  const anew = wait('a')
  await settle()
  t.same([anew.is, clients.length], ['waiting', 2])
})

t.test('a connection that cannot be destroyed, or does not end, is not waited for', async (t) => {
  for (const connection of [undefined, {}]) {
    const { clients, notifications, wait } = open()
    wait('a')
    await settle()
    Object.assign(clients[0] as Client, { connection })
    await notifications.close()
  }
  const { clients, does, notifications, wait } = open()
  wait('a')
  await settle()
  does.end = never
  await notifications.close()
  t.equal(clients[0]?.destroyed, true)
})

t.test('a connection that fails while all is closed does not harm the next', async (t) => {
  const { clients, does, notifications, wait } = open()
  let fail = (_error: Error) => {}
  does.connect = () => new Promise((_resolve, reject) => (fail = reject))
  wait('a')
  await settle()
  const closed = notifications.close()
  does.connect = async () => {}
  const anew = wait('a')
  await settle()
  fail(new Error('late'))
  await closed
  await settle()
  t.same([anew.is, clients.length], ['waiting', 2])
  const third = wait('a')
  await settle()
  t.same([third.is, clients.length], ['waiting', 2])
})
