import { type TypeBoxTypeProvider, TypeBoxValidatorCompiler } from '@fastify/type-provider-typebox'
import Fastify, { type FastifyInstance } from 'fastify'
import { serializerCompiler, validatorCompiler, type ZodTypeProvider } from 'fastify-type-provider-zod'
import t, { type Test } from 'tap'
import { Type } from 'typebox'
import { z } from 'zod'
import idempotency, { type IdempotencyOptions } from '../../index.js'
import { codeOf } from '../support/app.js'
import { isReplay, post } from './kit.js'

interface Scene {
  app: FastifyInstance
  runs: () => number
}

async function server(t: Test, options: IdempotencyOptions): Promise<FastifyInstance> {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(idempotency, options)
  return app
}

type Make = (t: Test, options?: IdempotencyOptions) => Promise<Scene>

/** The same route with the same schema, in the words of each provider: its handler gives more than its reply has. */
const providers: Record<string, Make> = {
  async TypeBox(t, options = {}) {
    const app = (await server(t, options)).withTypeProvider<TypeBoxTypeProvider>()
    let runs = 0
    app.post(
      '/',
      {
        schema: {
          body: Type.Object({ amount: Type.Integer({ minimum: 1 }), currency: Type.String({ default: 'EUR' }) }),
          response: { 201: Type.Object({ id: Type.String(), amount: Type.Integer() }) }
        },
        config: { idempotency: true }
      },
      async ({ body: { amount, currency } }, reply) =>
        reply.code(201).send({ id: `${currency} ${++runs}`, amount, secret: 'not for clients' } as never)
    )
    return { app: app as unknown as FastifyInstance, runs: () => runs }
  },
  async 'TypeBox with its own compiler'(t, options = {}) {
    const app = (await server(t, options)).withTypeProvider<TypeBoxTypeProvider>()
    app.setValidatorCompiler(TypeBoxValidatorCompiler)
    let runs = 0
    app.post(
      '/',
      {
        schema: {
          body: Type.Object({ amount: Type.Integer({ minimum: 1 }) }),
          response: { 201: Type.Object({ id: Type.String(), amount: Type.Integer() }) }
        },
        config: { idempotency: true }
      },
      async ({ body: { amount } }, reply) =>
        reply.code(201).send({ id: `EUR ${++runs}`, amount, secret: 'not for clients' } as never)
    )
    return { app: app as unknown as FastifyInstance, runs: () => runs }
  },
  async Zod(t, options = {}) {
    const app = (await server(t, options)).withTypeProvider<ZodTypeProvider>()
    app.setValidatorCompiler(validatorCompiler)
    app.setSerializerCompiler(serializerCompiler)
    let runs = 0
    app.post(
      '/',
      {
        schema: {
          body: z.object({ amount: z.int().min(1), currency: z.string().default('EUR') }),
          response: { 201: z.object({ id: z.string(), amount: z.int() }) }
        },
        config: { idempotency: true }
      },
      async ({ body: { amount, currency } }, reply) =>
        reply.code(201).send({ id: `${currency} ${++runs}`, amount, secret: 'not for clients' } as never)
    )
    return { app: app as unknown as FastifyInstance, runs: () => runs }
  }
}

for (const [name, make] of Object.entries(providers)) {
  for (const hook of ['onRequest', 'preHandler'] as const) {
    t.test(`routes with ${name} are covered like others, with a claim in ${hook}`, async (t) => {
      const { app, runs } = await make(t, { hook })
      const invalid = await post(app, { key: 'a', payload: { amount: 0 } })
      t.equal(invalid.statusCode, 400)
      t.equal(await app.idempotency.get('a'), null, 'an invalid body leaves the key free')
      const first = await post(app, { key: 'a', payload: { amount: 5 } })
      t.same([first.statusCode, first.json()], [201, { id: 'EUR 1', amount: 5 }])
      const replay = await post(app, { key: 'a', payload: { amount: 5 } })
      t.ok(isReplay(replay))
      t.same(
        [replay.statusCode, replay.body, replay.headers['content-type']],
        [201, first.body, first.headers['content-type']]
      )
      t.equal(codeOf(await post(app, { key: 'a', payload: { amount: 6 } })), 'FST_IDEMPOTENCY_KEY_REUSED')
      t.equal((await post(app, { key: 'a', payload: { amount: 0 } })).statusCode, 400, 'no replay for an invalid body')
      t.equal(runs(), 1)
      const found = await app.idempotency.get('a')
      t.notMatch(
        found?.state === 'completed' && found.record.kind === 'reply' && found.record.body.toString(),
        /secret/
      )
    })
  }
}

t.test('the plugin\u2019s own errors pass a Zod schema of errors', async (t) => {
  const app = (await server(t, {})).withTypeProvider<ZodTypeProvider>()
  app.setValidatorCompiler(validatorCompiler)
  app.setSerializerCompiler(serializerCompiler)
  const error = z.object({ code: z.string(), message: z.string() })
  app.post(
    '/',
    { schema: { body: z.unknown(), response: { 422: error } }, config: { idempotency: true } },
    async () => {}
  )
  const typed = app as unknown as FastifyInstance
  await post(typed, { key: 'a' })
  const reused = await post(typed, { key: 'a', payload: { other: true } })
  t.same([reused.statusCode, Object.keys(reused.json())], [422, ['code', 'message']])
})
