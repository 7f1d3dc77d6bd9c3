module.exports = async (app) => {
  await app.register(require('fastify-idempotency'))
}
