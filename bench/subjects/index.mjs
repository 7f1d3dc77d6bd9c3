/*
 * Who takes part. Each is built in a process of its own, so that none pays for what another has done to the compiler's
 * assumptions; the modules are loaded there only.
 *
 *   store    what it needs: 'none', 'memory', 'redis', 'postgres', 'sqlite' or 'mysql'
 *   marks    whether its replays carry the header that says so
 *   floor    the version by hand that it is compared with, where it is not the plain one of its store
 *   slow     takes that many times fewer requests per window; per request it is compared all the same
 */
export const subjects = [
  { name: 'bare', title: 'bare Fastify', store: 'none', from: 'bare.mjs', build: 'bare' },
  {
    name: 'floor-memory',
    title: 'by hand, memory',
    store: 'memory',
    from: 'floor.mjs',
    build: 'floorInMemory',
    marks: true
  },
  {
    name: 'memory',
    title: 'fastify-idempotency, memory',
    store: 'memory',
    from: 'plugin.mjs',
    build: 'inMemory',
    marks: true,
    ours: true
  },
  {
    name: 'cached',
    title: 'fastify-idempotency, Redis + LocalCache',
    store: 'redis',
    from: 'plugin.mjs',
    build: 'onRedisWithCache',
    marks: true,
    ours: true,
    needs: 'hasLocalCache'
  },
  {
    name: 'node-idempotency-memory',
    title: '@node-idempotency/core, memory',
    store: 'memory',
    from: 'node-idempotency.mjs',
    build: 'nodeIdempotencyInMemory',
    marks: true
  },
  {
    name: 'floor-redis',
    title: 'by hand, Redis',
    store: 'redis',
    from: 'floor.mjs',
    build: 'floorOnRedis',
    marks: true
  },
  {
    name: 'redis',
    title: 'fastify-idempotency, Redis',
    store: 'redis',
    from: 'plugin.mjs',
    build: 'onRedis',
    marks: true,
    ours: true
  },
  {
    name: 'floor-redis-unpipelined',
    title: 'by hand, Redis without auto pipelining',
    store: 'redis',
    from: 'floor.mjs',
    build: 'floorOnRedisUnpipelined',
    marks: true
  },
  {
    name: 'redis-unpipelined',
    title: 'fastify-idempotency, Redis without auto pipelining',
    store: 'redis',
    from: 'plugin.mjs',
    build: 'onRedisUnpipelined',
    marks: true,
    ours: true,
    floor: 'floor-redis-unpipelined'
  },
  {
    name: 'redis-by-node-redis',
    title: 'fastify-idempotency, Redis by node-redis',
    store: 'redis',
    from: 'plugin.mjs',
    build: 'onNodeRedis',
    marks: true,
    ours: true
  },
  {
    name: 'floor-redis-unsafe',
    title: 'by hand, Redis, no owner check',
    store: 'redis',
    from: 'floor.mjs',
    build: 'floorOnRedisUnsafe',
    marks: true
  },
  {
    name: 'node-idempotency-redis',
    title: '@node-idempotency/core, Redis (no owner check)',
    store: 'redis',
    from: 'node-idempotency.mjs',
    build: 'nodeIdempotencyOnRedis',
    marks: true
  },
  {
    name: 'powertools-redis',
    title: '@aws-lambda-powertools/idempotency, Redis (no owner check)',
    store: 'redis',
    from: 'powertools.mjs',
    build: 'powertoolsOnRedis'
  },
  {
    name: 'express-redis',
    title: 'express-idempotency, Redis (on Express, no owner check)',
    store: 'redis',
    from: 'express-idempotency.mjs',
    build: 'expressIdempotencyOnRedis',
    slow: 8
  },
  {
    name: 'floor-postgres',
    title: 'by hand, PostgreSQL',
    store: 'postgres',
    from: 'floor.mjs',
    build: 'floorOnPostgres',
    marks: true,
    slow: 4
  },
  {
    name: 'postgres',
    title: 'fastify-idempotency, PostgreSQL',
    store: 'postgres',
    from: 'plugin.mjs',
    build: 'onPostgres',
    marks: true,
    ours: true,
    slow: 4
  },
  {
    name: 'sqlite',
    title: 'fastify-idempotency, SQLite',
    store: 'sqlite',
    from: 'plugin.mjs',
    build: 'onSqlite',
    marks: true,
    ours: true,
    slow: 4
  },
  {
    name: 'mysql',
    title: 'fastify-idempotency, MariaDB',
    store: 'mysql',
    from: 'plugin.mjs',
    build: 'onMysql',
    marks: true,
    ours: true,
    slow: 4
  }
]

export function subjectNamed(name) {
  return subjects.find((subject) => subject.name === name)
}
