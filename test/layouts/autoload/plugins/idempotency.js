const fp = require('fastify-plugin')

module.exports = fp(async (app) => {
  await app.register(require('fastify-idempotency'))
})
