import { execFile } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { promisify } from 'node:util'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import type Stripe from 'stripe'
import t, { type Test } from 'tap'
import idempotency from '../../index.js'
import { type Latch, latch } from '../support/latch.js'
import type { Given } from './given.js'

/* The settings that docs/clients.md gives for other clients, each tried with the client itself. */

const run = promisify(execFile)
const page = readFileSync(new URL('../../../docs/clients.md', import.meta.url), 'utf8')

type Request = [url: string, key: string, body: object]

/** Sends operations, one after the other, each as often as the client thinks right; and gives the last status of each. */
type Client = (requests: Request[]) => Promise<(number | undefined)[]>

/** What a server saw of one key. */
interface Story {
  arrived: number
  runs: number
  /** The statuses that it has answered with, in their order. */
  answers: string[]
  /** Ends the first run of the handler. */
  goOn: Latch<void>
}

/** A shop that tells, for each key, what has happened. */
async function shop(t: Test, register: (app: FastifyInstance) => PromiseLike<unknown>) {
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(() => {
    app.server.closeAllConnections()
    return app.close()
  })
  await register(app)
  const stories = new Map<unknown, Story>()
  const of = ({ headers }: FastifyRequest) => {
    const key = headers['idempotency-key']
    const known = stories.get(key) ?? { arrived: 0, runs: 0, answers: [], goOn: latch<void>() }
    stories.set(key, known)
    return known
  }
  app.addHook('onRequest', async (request) => void of(request).arrived++)
  app.addHook('onSend', async (request, reply) => {
    const { answers, goOn } = of(request)
    answers.push(`${reply.statusCode}${request.idempotency?.replayed ? ' replayed' : ''}`)
    if (reply.statusCode === 409) goOn.open()
  })
  return { app, of, stories, story: (key: unknown) => stories.get(key) as Story }
}

/**
 * A route that goes wrong in turn: its server is not ready, then the connection is cut while the handler runs, which ends
 * when the client has come again. Whoever comes after that gets the reply.
 */
function troubled(app: FastifyInstance, of: (request: FastifyRequest) => Story, url: string, waits: boolean): void {
  app.post(
    url,
    {
      config: { idempotency: { required: true, onConflict: waits ? 'wait' : 'reject' } },
      async onRequest(request, reply) {
        const { arrived, goOn } = of(request)
        if (arrived === 1) return reply.code(503).header('retry-after', '0').send('not yet')
        if (waits && arrived === 3) goOn.open()
      }
    },
    async (request: FastifyRequest, reply: FastifyReply) => {
      const its = of(request)
      its.runs++
      request.raw.socket.destroy()
      await its.goOn.promise
      return reply.code(201).send({ run: its.runs })
    }
  )
}

const tried = new Set<string>()

async function snippet<T>(name: string, given: Partial<Given> = {}): Promise<T> {
  tried.add(name)
  const { run } = (await import(`./snippets/${name}.js`)) as { run(given: Partial<Given>): Promise<T> }
  return run(given)
}

/** The block of another language under a name. */
function block(name: string): string {
  const [, code] = new RegExp(`<!-- snippet: ${name} -->\n\`\`\`\\w+\n([\\s\\S]*?)\`\`\``).exec(page) ?? []
  if (code === undefined) throw new Error(`docs/clients.md has no block ${name}`)
  return code
}

/** A client of a snippet; what it rejects with has the last reply. */
async function ofSnippet(name: string): Promise<Client> {
  type Reply = { status?: number; statusCode?: number }
  const { post } = await snippet<{ post(...request: Request): Promise<Reply> }>(name)
  return async (requests) => {
    const statuses = []
    for (const request of requests) {
      const reply = await post(...request).catch(({ response }: { response?: Reply }) => response)
      statuses.push(reply?.statusCode ?? reply?.status)
    }
    return statuses
  }
}

const curl: Client = async (requests) => {
  const statuses = []
  for (const [url, key, body] of requests) {
    const script = block('curl')
      .replace('$(uuidgen)', key)
      .replace('https://api.example.com/charges', url)
      .replace(/'\{.*\}'/, `'${JSON.stringify(body)}'`)
    const { stdout } = await run('bash', ['-c', script])
    // With -i the replies of all attempts are printed.
    statuses.push(Number([...stdout.matchAll(/HTTP\/1\.1 (\d+)/g)].at(-1)?.[1]))
  }
  return statuses
}

const PYTHON_CALLS = `
import json, sys

for request in json.loads(sys.argv[1]):
    reply = post(*request)
    print(getattr(reply, "status", None) or reply.status_code)
`

/** A Python that has the library; `null` where there is none. */
async function inPython(library: string): Promise<Client | null> {
  for (const name of PYTHONS) {
    const find = `import sys, ${library}; print(sys.executable)`
    const found = await run(name, ['-c', find]).catch(() => null)
    if (found === null) continue
    const python = found.stdout.trim()
    return async (requests) => {
      const { stdout } = await run(python, ['-c', block(library) + PYTHON_CALLS, JSON.stringify(requests)])
      return stdout.trim().split('\n').map(Number)
    }
  }
  return null
}

const PYTHONS = ['python3', '/usr/bin/python3']

/** What the table says of a client. */
interface Row {
  client: Client | null
  /** It takes a 409 for an answer, and the server has to wait. */
  waits?: boolean
  /** It repeats a replayed 500 too. */
  insists?: boolean
}

t.test(
  'each sends one key until it has the reply of the one run, and stops at what is final',
  { timeout: 60_000 },
  async (t) => {
    const [urllib3, httpx] = await Promise.all([inPython('urllib3'), inPython('httpx')])
    const rows: Record<string, Row> = {
      got: { client: await ofSnippet('client-got') },
      ky: { client: await ofSnippet('client-ky') },
      axios: { client: await ofSnippet('client-axios') },
      undici: { client: await ofSnippet('client-undici') },
      superagent: { client: await ofSnippet('client-superagent') },
      curl: { client: curl, waits: true, insists: true },
      urllib3: { client: urllib3, insists: true },
      httpx: { client: httpx }
    }
    const { app, of, story, stories } = await shop(t, (app) => app.register(idempotency))
    troubled(app, of, '/charges', false)
    troubled(app, of, '/waits', true)
    app.post('/fails', { config: { idempotency: { shouldStore: () => true } } }, async (_request, reply) =>
      reply.code(500).send('no')
    )
    app.post('/large', { config: { idempotency: { maxReplySize: 1 } } }, async () => 'large')
    const base = await app.listen({ host: '127.0.0.1', port: 0 })

    const check = async ([name, { client, waits = false, insists = false }]: [string, Row]) => {
      if (client === null) {
        return t.pass(name, { skip: `no ${PYTHONS.join(' or ')} can import it: docs/clients.md is not tried there` })
      }
      const charges = `${base}${waits ? '/waits' : '/charges'}`
      const failing: Request[] = insists ? [] : [[`${base}/fails`, `${name}-fails`, {}]]
      const statuses = await client([
        [charges, `${name}-charge`, { amount: 1 }],
        [`${base}/large`, `${name}-large`, {}],
        [`${base}/large`, `${name}-large`, {}],
        [charges, `${name}-charge`, { amount: 2 }],
        ...failing
      ])
      t.same(statuses, [201, 200, 409, 422, ...(insists ? [] : [500])], `${name}: the last status of each operation`)
      const { runs, answers } = story(`${name}-charge`)
      t.equal(runs, 1, `${name}: the handler ran once`)
      // The reply whose connection was cut is the second but last: it is made when the client has come again.
      t.same(answers, ['503', ...(waits ? [] : ['409']), '201', '201 replayed', '422'], `${name}: what it was answered`)
      t.same(story(`${name}-large`).answers, ['200', '409'], `${name}: a conflict that no time will mend`)
      if (!insists) t.same(story(`${name}-fails`).answers, ['500', '500 replayed'], `${name}: a failure that is final`)
    }
    // All at the same time: what takes time is their pauses.
    await Promise.all(Object.entries(rows).map(check))
    t.notOk(stories.has(undefined), 'no attempt was without a key')
  }
)

t.test("Stripe's SDK sends a key of its own, and knows what is said in its format", { timeout: 60_000 }, async (t) => {
  const { app, of, story, stories } = await shop(t, (app) => snippet('stripe-server', { app, idempotency }))
  troubled(app, of, '/v1/charges', false)
  app.post('/v1/customers', async (_request, reply) => reply.code(500).send({ error: { type: 'api_error' } }))
  const server = await app.listen({ host: '127.0.0.1', port: 0 })
  type Charge = (amount: number, key?: string) => Promise<unknown>
  const { charge, stripe } = await snippet<{ charge: Charge; stripe: Stripe }>('stripe-client', { server })

  const customer = stripe.customers.create({}, { idempotencyKey: 'customer' })
  const [, , error] = await Promise.all([charge(1), charge(1, 'mine'), customer.catch((error) => error)])
  const [own = ''] = [...stories.keys()].filter((key) => key !== 'mine' && key !== 'customer') as string[]
  t.match(own, /^stripe-node-retry-/)
  for (const key of [own, 'mine']) {
    const { runs, answers } = story(key)
    t.same([runs, answers], [1, ['503', '409', '201', '201 replayed']], key)
  }
  t.match(error, { type: 'StripeAPIError', statusCode: 500 })
  t.same(story('customer').answers, ['500', '500 replayed'], 'the replay says that it is in vain')
  const refusal = await charge(2, 'mine').catch((error: unknown) => error)
  t.match(refusal, { type: 'StripeIdempotencyError', statusCode: 400 })
  t.equal(story('mine').answers.at(-1), '400')
  t.equal(story('mine').answers.length, 5)
})

t.test('no snippet of a client was left out', async (t) => {
  const all = readdirSync(new URL('snippets/', import.meta.url)).filter((file) => /^(client|stripe)-.*\.js$/.test(file))
  t.same([...tried].sort(), all.map((file) => file.replace('.js', '')).sort())
})
