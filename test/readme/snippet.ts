import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import idempotency from '../../index.js'
import type { Given } from '../docs/given.js'

interface Snippet {
  run(given: Given): Promise<Record<string, unknown>>
}

interface Owner {
  teardown(fn: () => unknown): void
}

/** The snippets that `recipes.test.ts` runs. */
export const RECIPES = [
  'redis',
  'autoload',
  'fastify-cli',
  'scope',
  'jwt',
  'auth',
  'session',
  'api-key',
  'graphql',
  'changing-field',
  'target',
  'conditional',
  'gateway',
  'gateway-digest',
  'uploads',
  'webhooks',
  'attempt-counter'
]

/** Those that `readme.test.ts` runs. All others are run by the tests in `docs/`, or by a test that they name. */
export const OTHERS = [
  'quick-start',
  'commonjs',
  'transaction',
  'drizzle',
  'kysely',
  'steps',
  'handler',
  'instance',
  'own-store',
  'testkit',
  'node-redis',
  'local-cache',
  'encrypted',
  'mysql',
  'sqlite',
  'client',
  'openapi',
  'forms',
  'stripe',
  'abandoned',
  'cors',
  'metrics',
  'events'
]

/** The snippets that a test file has run. */
export const tried = new Set<string>()

/** How often a snippet's handler has run. */
export const handled = { runs: 0 }

/** Runs a snippet; what it uses and does not declare is as harmless as it can be, unless it is given. */
export async function snippet(name: string, given: Partial<Given> = {}): Promise<Record<string, unknown>> {
  tried.add(name)
  handled.runs = 0
  const { run } = (await import(`../docs/snippets/${name}.js`)) as Snippet
  const defaults: Partial<Given> = {
    idempotency,
    handler: async () => ({ run: ++handled.runs }),
    accountOf,
    verifySession: async (request) => {
      request.account = await accountOf(request.headers.cookie)
    },
    verifySignature: async (request) => void (await accountOf(request.headers['x-signature'])),
    chargeCard: async () => ({ id: `ch_${++handled.runs}` }),
    schema: '',
    resolvers: {}
  }
  return run({ ...defaults, ...given } as Given)
}

/** A server without the plugin, or with it and no options. */
export async function bare(t: Owner, register = false): Promise<FastifyInstance> {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => app.close())
  if (register) await app.register(idempotency)
  return app
}

/** Whose credentials these are: `of alice` are those of alice, and whatever else there is has expired, or is forged. */
export async function accountOf(credentials: FastifyRequest['headers'][string]): Promise<string> {
  const [, account] = /^of (\w+)$/.exec(String(credentials)) ?? []
  if (account === undefined) throw Object.assign(new Error('Who are you?'), { statusCode: 401 })
  return account
}
