module.exports = require('fastify-idempotency')
