import { inspect } from 'node:util'

/** What a value is, for an error: nothing of what is in an object, which may be a password. */
export function describe(value: unknown): string {
  if (value === null) return 'null'
  const kind = Array.isArray(value) ? 'array' : typeof value
  const depth = kind === 'object' || kind === 'function' ? -1 : 0
  const text = inspect(value, { depth, breakLength: Infinity }).replace(/:\/\/[^'"`\s]*@/g, '://…@')
  return `${text.slice(0, 80)} (${kind})`
}

/** What was given for a secret, and nothing of what is in it. */
export function describeSecret(value: unknown): string {
  if (typeof value === 'string') return `a string of ${value.length} characters`
  if (ArrayBuffer.isView(value)) return `${value.byteLength} bytes (${value.constructor.name})`
  if (Array.isArray(value)) return `an array of ${value.length}`
  return typeof value === 'object' ? inspect(value, { depth: -1 }) : typeof value
}

/** What was given in place of a store, and what to write instead. */
export function describeStore(value: unknown): string {
  const advice = adviceFor(value)
  return `${describe(value)}${advice === null ? '' : `: ${advice}`}`
}

function adviceFor(value: unknown): string | null {
  if (typeof value === 'string') return 'an address is no store; write new RedisStore(new Redis(…)) with ioredis'
  if (value === null || (typeof value !== 'object' && typeof value !== 'function')) return null
  const has = (...names: string[]) => names.every((name) => typeof (value as never)[name] === 'function')
  if (typeof value === 'function') {
    const { name, prototype } = value
    return typeof prototype?.acquire === 'function' ? `write new ${name}(…)` : null
  }
  if (has('pipeline', 'duplicate', 'evalsha')) return 'a client of ioredis; write new RedisStore(client)'
  if (has('sendCommand', 'multi')) return 'a client of node-redis; write new RedisStore(client)'
  const { pool } = value as { pool?: unknown }
  if (has('query', 'execute', 'getConnection')) {
    return has('on')
      ? 'a pool of mysql2; write new MysqlStore({ pool })'
      : 'what @fastify/mysql decorates; write new MysqlStore({ pool: app.mysql.pool })'
  }
  if (has('query', 'connect', 'transact') && pool !== undefined) {
    return 'what @fastify/postgres decorates; write new PostgresStore({ pool: app.pg.pool })'
  }
  if (has('query', 'connect', 'end')) {
    return 'totalCount' in value
      ? 'a pool of pg; write new PostgresStore({ pool })'
      : 'a client of pg; write new PostgresStore({ pool }) with a pool'
  }
  return null
}
