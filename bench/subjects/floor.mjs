import { hash, randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import { postgresPool, redisClient } from './clients.mjs'
import { COVERED, UNCOVERED } from './route.mjs'
import { served } from './served.mjs'

/*
 * The floor: the least idempotency that one would write by hand for one route, and that works. One preHandler hook
 * that claims, compares the payload and replays; one onSend hook that stores status, headers and body before the
 * reply leaves. Callback hooks, and no promise anywhere.
 * It has no leases, no renewal, no streams, no scopes, no options and no errors of its own.
 */

const TTL = 86_400_000
const VOLATILE = new Set(['content-length', 'date', 'connection', 'set-cookie', 'keep-alive', 'transfer-encoding'])

export async function floorInMemory({ route }) {
  const store = new MapStore()
  return build(route, store, async () => store.close())
}

/** Two commands: SET NX GET to claim or to read, a compare-and-set script to complete. */
export async function floorOnRedis({ route, redis }) {
  const client = await redisClient(redis)
  return build(route, new RedisFloor(client, true), async () => client.disconnect())
}

export async function floorOnRedisUnpipelined({ route, redis }) {
  const client = await redisClient(redis, false)
  return build(route, new RedisFloor(client, true), async () => client.disconnect())
}

/** The same without asking whether the claim is still ours: two plain commands, and unsafe after a stall. */
export async function floorOnRedisUnsafe({ route, redis }) {
  const client = await redisClient(redis)
  return build(route, new RedisFloor(client, false), async () => client.disconnect())
}

/** Two prepared statements: an insert that claims or else reads, an update of the row that is still ours. */
export async function floorOnPostgres({ route, postgres }) {
  const pool = postgresPool(postgres)
  await pool.query(FLOOR_TABLE)
  return build(route, new PostgresFloor(pool), () => pool.end())
}

async function build(route, store, close) {
  const app = Fastify()
  app.decorateRequest('claim', null)
  const preHandler = (request, reply, done) => {
    const key = request.headers['idempotency-key']
    if (key === undefined) return done()
    const fingerprint = hash('sha256', JSON.stringify(request.body), 'base64url')
    store.acquire(key, fingerprint, (error, found, claim) => {
      if (error) return done(error)
      if (found === null) {
        request.claim = claim
        return done()
      }
      if (found.fingerprint !== fingerprint) return reply.code(422).send({ error: 'key reused' })
      if (found.status === 0) return reply.code(409).send({ error: 'in progress' })
      reply.code(found.status).headers(found.headers).header('idempotent-replayed', 'true').send(found.body)
    })
  }
  const onSend = (request, reply, payload, done) => {
    const { claim } = request
    if (claim === null) return done(null, payload)
    request.claim = null
    if (reply.statusCode >= 500) return store.release(claim, (error) => done(error, payload))
    const headers = {}
    const all = reply.getHeaders()
    for (const name in all) if (!VOLATILE.has(name)) headers[name] = all[name]
    store.complete(claim, reply.statusCode, headers, payload, (error) => done(error, payload))
  }
  app.post(COVERED, { preHandler, onSend }, route.handle)
  app.post(UNCOVERED, route.handle)
  await app.ready()
  return served(app, close)
}

class MapStore {
  #entries = new Map()
  // Equal lives: the oldest expires first.
  #sweep = setInterval(() => {
    const now = performance.now()
    for (const [key, { expires }] of this.#entries) {
      if (expires > now) break
      this.#entries.delete(key)
    }
  }, 1_000).unref()

  acquire(key, fingerprint, done) {
    const found = this.#entries.get(key)
    if (found !== undefined && found.expires > performance.now()) return done(null, found, null)
    const claim = { key, fingerprint, status: 0, headers: null, body: '', expires: performance.now() + TTL }
    this.#entries.set(key, claim)
    done(null, null, claim)
  }

  complete(claim, status, headers, body, done) {
    claim.status = status
    claim.headers = headers
    claim.body = body
    done(null)
  }

  release(claim, done) {
    this.#entries.delete(claim.key)
    done(null)
  }

  close() {
    clearInterval(this.#sweep)
  }
}

const COMPLETE = `if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) return 1 end return 0`
const RELEASE = `if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0`
/** Nothing renews it: it has to outlive its measurement. */
const LEASE = 600_000

/** The record as one frame: kind, fingerprint (43 bytes), length of the head, head, body. */
class RedisFloor {
  #client
  #safe

  constructor(client, safe) {
    this.#client = client
    this.#safe = safe
    client.defineCommand('floorComplete', { numberOfKeys: 1, lua: COMPLETE })
    client.defineCommand('floorRelease', { numberOfKeys: 1, lua: RELEASE })
  }

  acquire(key, fingerprint, done) {
    const value = `P${fingerprint}${randomUUID()}`
    this.#client.setBuffer(`floor:${key}`, value, 'PX', LEASE, 'NX', 'GET', (error, found) => {
      if (error) done(error)
      else if (found === null) done(null, null, { key, value, fingerprint })
      else done(null, read(found), null)
    })
  }

  complete({ key, value, fingerprint }, status, headers, body, done) {
    const head = JSON.stringify([status, headers])
    const size = Buffer.byteLength(head)
    const record = Buffer.allocUnsafe(46 + size + Buffer.byteLength(body))
    record.write(`C${fingerprint}`, 0, 'latin1')
    record.writeUInt16BE(size, 44)
    record.write(head, 46)
    record.write(body, 46 + size)
    if (this.#safe) this.#client.floorComplete(`floor:${key}`, value, record, TTL, done)
    else this.#client.set(`floor:${key}`, record, 'PX', TTL, done)
  }

  release({ key, value }, done) {
    this.#client.floorRelease(`floor:${key}`, value, done)
  }
}

function read(found) {
  const fingerprint = found.latin1Slice(1, 44)
  if (found[0] === 0x50) return { fingerprint, status: 0 }
  const end = 46 + found.readUInt16BE(44)
  const [status, headers] = JSON.parse(found.utf8Slice(46, end))
  return { fingerprint, status, headers, body: found.subarray(end) }
}

const FLOOR_TABLE = `CREATE TABLE IF NOT EXISTS floor_keys (
  key text PRIMARY KEY, token text, fingerprint text NOT NULL, status int, headers text, body text,
  expires_at timestamptz NOT NULL
)`

/** Rows that have expired are somebody else's to delete. */
class PostgresFloor {
  #pool

  constructor(pool) {
    this.#pool = pool
  }

  acquire(key, fingerprint, done) {
    const token = randomUUID()
    this.#pool.query({ ...CLAIM, values: [key, token, fingerprint, LEASE] }, (error, result) => {
      if (error) return done(error)
      const [row] = result.rows
      // Another has just been faster: its row could not be seen yet.
      if (row === undefined) return done(null, { fingerprint, status: 0 }, null)
      if (row.token === token) return done(null, null, { key, token })
      done(null, { ...row, status: row.status ?? 0, headers: row.headers && JSON.parse(row.headers) }, null)
    })
  }

  complete({ key, token }, status, headers, body, done) {
    this.#pool.query({ ...FINISH, values: [key, token, status, JSON.stringify(headers), body, TTL] }, done)
  }

  release({ key, token }, done) {
    this.#pool.query({ ...DROP, values: [key, token] }, done)
  }
}

const CLAIM = {
  name: 'floor-claim',
  text: `WITH taken AS (
      INSERT INTO floor_keys (key, token, fingerprint, expires_at)
      VALUES ($1, $2, $3, now() + $4 * interval '1 ms') ON CONFLICT DO NOTHING RETURNING token
    )
    SELECT token, NULL AS fingerprint, NULL::int AS status, NULL AS headers, NULL AS body FROM taken
    UNION ALL
    SELECT token, fingerprint, status, headers, body FROM floor_keys
    WHERE key = $1 AND NOT EXISTS (SELECT FROM taken)`
}
const FINISH = {
  name: 'floor-finish',
  text: `UPDATE floor_keys SET status = $3, headers = $4, body = $5, expires_at = now() + $6 * interval '1 ms'
    WHERE key = $1 AND token = $2 AND status IS NULL`
}
const DROP = {
  name: 'floor-drop',
  text: 'DELETE FROM floor_keys WHERE key = $1 AND token = $2 AND status IS NULL'
}
