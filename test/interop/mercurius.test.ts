import Fastify, { type FastifyInstance } from 'fastify'
import mercurius, { type MercuriusOptions } from 'mercurius'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions } from '../../index.js'
import { keyReused } from '../../lib/errors.js'
import { isReplay, type Order, post, register } from './kit.js'

const schema = `
  type Charge { id: Int!, amount: Int! }
  type Query { charges: Int! }
  type Mutation { charge(amount: Int!): Charge! }`

const CHARGE = 'mutation ($amount: Int!) { charge(amount: $amount) { id amount } }'

interface Setup {
  order?: Order
  options?: IdempotencyOptions
  graphql?: MercuriusOptions
}

/** A GraphQL API, all of whose POST requests are covered. */
async function server(t: Test, { order = 'before', options = {}, graphql = {} }: Setup = {}) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  const state = { charges: 0, broken: false }
  const resolvers = {
    Query: { charges: () => state.charges },
    Mutation: {
      charge: (_: unknown, { amount }: { amount: number }) => {
        if (state.broken) throw new Error('The provider is down')
        return { id: ++state.charges, amount }
      }
    }
  }
  await register(
    order,
    () => app.register(idempotency, { global: true, ...options }),
    () => app.register(mercurius, { schema, resolvers, ...graphql } as MercuriusOptions)
  )
  const charge = (key: string, amount = 1) =>
    post(app, { url: '/graphql', key, payload: { query: CHARGE, variables: { amount } } })
  const count = async (headers = {}) => {
    const payload = { query: '{ charges }' }
    return (await app.inject({ method: 'POST', url: '/graphql', headers, payload })).json().data.charges as number
  }
  return { app, state, charge, count }
}

/** The plugin's own error, in the form that mercurius gives to errors. */
function messageOf(reply: { json(): { errors?: { message: string }[] } }): string | undefined {
  return reply.json().errors?.[0]?.message
}

t.test('a mutation runs once for its key', async (t) => {
  const { charge, count } = await server(t)
  const [first, replay] = [await charge('a'), await charge('a')]
  t.same(first.json(), { data: { charge: { id: 1, amount: 1 } } })
  t.ok(isReplay(replay))
  t.equal(replay.body, first.body)
  const reused = await charge('a', 2)
  t.same([reused.statusCode, messageOf(reused)], [422, keyReused('payload').message], 'the variables are compared')
  t.same((await charge('b')).json(), { data: { charge: { id: 2, amount: 1 } } })
  t.equal(await count(), 2)
})

t.test('mercurius declares its route itself: registered before the plugin, it fails the boot', async (t) => {
  await t.rejects(
    server(t, { order: 'after' }).then(({ app }) => app.ready()),
    { code: 'FST_IDEMPOTENCY_ROUTE_TOO_EARLY' }
  )
})

t.test('queries without a key run every time', async (t) => {
  const { charge, count } = await server(t)
  t.equal(await count(), 0)
  await charge('a')
  t.equal(await count(), 1)
})

t.test('where mutations have to have a key, queries can be let through', async (t) => {
  const isMutation = ({ body }: { body: unknown }) => /^\s*mutation\b/m.test((body as { query?: string })?.query ?? '')
  // `skip` needs the body, so the key is looked for when it is there.
  const options: IdempotencyOptions = {
    required: true,
    hook: 'preHandler',
    skip: (request) => !isMutation(request)
  }
  const { app, charge, count } = await server(t, { options })
  t.equal(await count(), 0)
  t.equal(await count({ 'idempotency-key': 'a' }), 0)
  await charge('a')
  t.ok(isReplay(await charge('a')))
  t.equal(await count({ 'idempotency-key': 'a' }), 1)
  const bare = await app.inject({
    method: 'POST',
    url: '/graphql',
    payload: { query: CHARGE, variables: { amount: 1 } }
  })
  t.equal(bare.statusCode, 400)
  t.match(messageOf(bare), /needs an idempotency key/)
})

t.test('an error of a resolver has the status 200 of GraphQL, and is final', async (t) => {
  const { state, charge } = await server(t)
  state.broken = true
  const failed = await charge('a')
  t.match(failed.json(), { data: null, errors: [{ message: 'The provider is down' }] })
  t.equal(failed.statusCode, 200)
  state.broken = false
  const retry = await charge('a')
  t.ok(isReplay(retry))
  t.equal(retry.body, failed.body)
})

t.test('an error that an errorFormatter gives a status that is not final is not stored', async (t) => {
  const graphql: MercuriusOptions = {
    errorFormatter: (execution, context) => ({
      ...mercurius.defaultErrorFormatter(execution, context),
      statusCode: 503
    })
  }
  const { state, charge } = await server(t, { graphql })
  state.broken = true
  t.equal((await charge('a')).statusCode, 503)
  state.broken = false
  const retry = await charge('a')
  t.notOk(isReplay(retry))
  t.same(retry.json(), { data: { charge: { id: 1, amount: 1 } } })
})

t.test('a route of its own for GraphQL has the same', async (t) => {
  const { app, charge } = await server(t, { options: { global: false }, graphql: { routes: false } })
  app.post<{ Body: { query: string; variables: Record<string, unknown> } }>(
    '/graphql',
    { config: { idempotency: true } },
    async ({ body }, reply) => reply.graphql(body.query, {}, body.variables)
  )
  const first = await charge('a')
  const replay = await charge('a')
  t.ok(isReplay(replay))
  t.equal(replay.body, first.body)
})
