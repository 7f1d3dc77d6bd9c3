// Two workers with the default store, which each has for itself.
const assert = require('node:assert/strict')
const cluster = require('node:cluster')

async function primary() {
  cluster.setupPrimary({ silent: true })
  const exits = [1, 2].map(async () => {
    const worker = cluster.fork()
    const warnings = []
    worker.on('message', (message) => warnings.push(message))
    let errors = ''
    worker.process.stderr.on('data', (chunk) => {
      errors += chunk
    })
    const code = await new Promise((resolve) => worker.on('exit', resolve))
    assert.equal(code, 0, errors)
    assert.deepEqual(warnings, ['FST_IDEMPOTENCY_MEMORY_STORE'])
  })
  await Promise.all(exits)
}

async function worker() {
  const warnings = []
  process.on('warning', ({ code }) => warnings.push(code))
  for (const _ of [1, 2]) {
    const app = require('fastify')()
    await app.register(require('fastify-idempotency'))
    for (const url of ['/one', '/two']) app.post(url, { config: { idempotency: true } }, async () => 'done')
    await app.listen({ port: 0 })
    await app.close()
  }
  for (const code of warnings.filter((code) => code?.startsWith('FST_IDEMPOTENCY'))) process.send(code)
  process.disconnect()
}

if (cluster.isPrimary) primary()
else worker()
