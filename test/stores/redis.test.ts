import { randomUUID } from 'node:crypto'
import t from 'tap'
import { RedisStore } from '../../index.js'
import { endures } from '../support/bad-network.js'
import { startRedis } from '../support/redis.js'
import { conforms } from '../support/store-fixtures.js'

/** Where the length of a record's head is: after the kind, the version, and a token of 36 bytes. */
const AFTER_TOKEN = 3 + 36

const server = await startRedis()
t.teardown(() => server.close())
const admin = await server.client()

/** Two stores with clients of their own, on keys of their own. */
async function stores(...options: Parameters<typeof server.client>) {
  const keyPrefix = `${randomUUID()}:`
  const clients = [await server.client(...options), await server.client(...options)] as const
  const [store, second] = [new RedisStore(clients[0], { keyPrefix }), new RedisStore(clients[1], { keyPrefix })]
  const dispose = async () => {
    await Promise.all([store.close(), second.close()])
    for (const client of clients) client.disconnect()
  }
  const interrupt = async () => {
    await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub')
    await admin.call('CLIENT', 'KILL', 'TYPE', 'normal')
  }
  const spoil = (key: string) => admin.setrange(keyPrefix + key, AFTER_TOKEN, '\x7f')
  return { store, second, dispose, interrupt, spoil }
}

conforms(t, 'a RedisStore keeps every promise of a store', stores)

endures(t, 'a RedisStore behind a bad network', stores)

conforms(t, 'a RedisStore keeps every promise with a client that pipelines by itself', () =>
  stores({ enableAutoPipelining: true })
)

for (const protocol of [2, 3] as const) {
  conforms(t, `a RedisStore keeps every promise with a client that speaks RESP${protocol}`, () => stores({ protocol }))
}
