import swagger from '@fastify/swagger'
import Fastify, { type FastifyInstance } from 'fastify'
// In a project of your own: import idempotency, { openapiTransform } from 'fastify-idempotency'
import idempotency, { openapiTransform } from '../index.js'

/** An API whose document says, at `/openapi.json`, which key its routes take, and what they answer because of it. */
export async function buildDocumentedApp(): Promise<FastifyInstance> {
  const app = Fastify() as unknown as FastifyInstance
  await app.register(swagger, {
    openapi: { openapi: '3.1.0', info: { title: 'Refunds', version: '1.0.0' } },
    transform: openapiTransform
  })
  await app.register(idempotency, { problemDetails: true })

  const refund = {
    type: 'object',
    required: ['charge', 'amount'],
    properties: { charge: { type: 'string' }, amount: { type: 'integer', minimum: 1 } }
  }
  app.post<{ Body: { charge: string; amount: number } }>(
    '/refunds',
    {
      schema: { summary: 'Give money back', body: refund, response: { 201: refund } },
      config: { idempotency: { required: true, keyFormat: 'uuid', ttl: 3_600_000 } }
    },
    async (request, reply) => reply.code(201).send(request.body)
  )
  app.get('/openapi.json', { schema: { hide: true } }, () => app.swagger())
  return app
}
