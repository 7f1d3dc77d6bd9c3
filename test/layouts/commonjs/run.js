// Everything is required where it is used: Fastify has made its server before the package is loaded.
const { failsToBoot, runsOnce, NOT_COVERED, TOO_EARLY } = require('../kit.js')
const assert = require('node:assert/strict')
const app = require('fastify')()

let runs = 0
const count = async () => ({ run: ++runs })

async function main() {
  // The package is loaded here for the first time, behind the server.
  assert.ok(!Object.keys(require.cache).some((file) => file.includes('fastify-idempotency')))
  app.register(require('fastify-idempotency'), { global: true })
  app.post('/charges', count)
  app.post('/refunds', { config: { idempotency: false } }, count)
  await failsToBoot(app, TOO_EARLY, ['POST /charges'])

  const before = require('fastify')()
  before.post('/charges', { config: { idempotency: { required: true } } }, count)
  before.register(require('fastify-idempotency'))
  await failsToBoot(before, TOO_EARLY, ['POST /charges'])

  const sibling = require('fastify')()
  sibling.register(async (child) => child.register(require('fastify-idempotency')))
  sibling.register(async (child) => child.post('/charges', { config: { idempotency: true } }, count))
  await failsToBoot(sibling, NOT_COVERED, ['POST /charges'])

  const forgotten = require('fastify')()
  forgotten.post('/charges', { config: { idempotency: true } }, count)
  await failsToBoot(forgotten, NOT_COVERED, ['POST /charges'])

  const right = require('fastify')()
  await right.register(require('fastify-idempotency'), { global: true })
  right.post('/charges', count)
  await runsOnce(right, '/charges')
  await right.close()
}
main()
