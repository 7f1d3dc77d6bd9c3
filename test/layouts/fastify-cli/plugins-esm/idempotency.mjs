export { default } from 'fastify-idempotency'
