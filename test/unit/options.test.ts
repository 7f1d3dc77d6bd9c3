import { inspect } from 'node:util'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { Redis } from 'ioredis'
import { createPool } from 'mysql2'
import t from 'tap'
import { isFinal } from '../../lib/http/finality.js'
import {
  concerns,
  describeRoute,
  type Policy,
  type RouteDeclaration,
  registrationOptions,
  routePolicy
} from '../../lib/options.js'
import { MemoryStore } from '../../lib/stores/memory/memory-store.js'
import { RedisStore } from '../../lib/stores/redis/redis-store.js'
import type { IdempotencyOptions, IdempotencyRouteOptions } from '../../types/index.js'
import { warningsOf } from '../support/warnings.js'

const WHERE = ' of POST /charges'

/** Options as JavaScript hands them over: unchecked. */
const registered = (options: object = {}) => registrationOptions(options as IdempotencyOptions)

function declared(config: unknown, options: object = {}, route: Partial<RouteDeclaration> = {}): Policy | null {
  return routePolicy(
    { method: 'POST', url: '/charges', config: { idempotency: config }, ...route },
    registered(options)
  )
}

function policy(config: unknown = true, options: object = {}): Policy {
  const covered = declared(config, options)
  if (covered === null) throw new Error('The route is not covered')
  return covered
}

/** The message with which an option is refused. */
function refusal(build: () => unknown): string {
  try {
    build()
  } catch (error) {
    const { code, message } = error as Error & { code?: string }
    if (code === 'FST_IDEMPOTENCY_INVALID_OPTION') return message
    throw error
  }
  throw new Error('Nothing was refused')
}

/** The statuses that `shouldStore` calls final. */
function finals(shouldStore: Policy['shouldStore']): number[] {
  const statuses = Array.from({ length: 500 }, (_, i) => 100 + i)
  return statuses.filter((statusCode) =>
    shouldStore({} as FastifyRequest, { statusCode, hasHeader: () => false } as unknown as FastifyReply)
  )
}

t.test('every option has the default that the contract promises', async (t) => {
  const { store, shouldStore, ...rest } = policy()
  t.ok(store instanceof MemoryStore, 'store')
  t.strictSame(
    finals(shouldStore),
    Array.from({ length: 400 }, (_, i) => 100 + i).filter((status) => ![401, 408, 423, 425, 429].includes(status)),
    'shouldStore: every status below 500 but 401, 408, 423, 425 and 429'
  )
  t.strictSame(rest, {
    route: '/charges',
    methods: null,
    skip: null,
    header: 'idempotency-key',
    headerName: 'Idempotency-Key',
    field: null,
    getKey: null,
    keyFormat: 'any',
    maxKeyLength: 255,
    required: false,
    scope: null,
    scoped: false,
    target: null,
    constraints: '',
    fingerprint: true,
    hook: 'preHandler',
    waits: false,
    waitTimeout: 60_000,
    lease: 30_000,
    reruns: true,
    transaction: false,
    nested: false,
    ttl: 86_400_000,
    retain: 86_400_000,
    redact: null,
    maxReplySize: 1_048_576,
    maxStepsSize: 65_536,
    excludeHeaders: new Set(),
    replayHeader: 'idempotent-replayed',
    replayHeaderName: 'Idempotent-Replayed',
    bypasses: false,
    storeTimeout: 2_000,
    problemDetails: false,
    documentationUrl: null
  })
  const { global, methods } = registered()
  t.equal(global, false, 'global')
  t.strictSame([...methods], ['POST', 'PATCH'], 'methods')
})

t.test('all routes of a registration share its default store, and two registrations share none', async (t) => {
  const registration = registered()
  const route = { method: 'POST', url: '/', config: { idempotency: true } }
  t.equal(routePolicy(route, registration)?.store, registration.routeDefaults.store)
  t.not(registered().routeDefaults.store, registration.routeDefaults.store)
})

const ours = new MemoryStore()
const theirs = new MemoryStore()
const yes = () => true
const text = () => 'text'

/** For each option: its value at the registration, another one at the route, and where and how the policy has that. */
const overrides: [keyof IdempotencyRouteOptions, unknown, unknown, keyof Policy, unknown][] = [
  ['store', ours, theirs, 'store', theirs],
  ['skip', () => false, yes, 'skip', yes],
  ['header', 'X-Ours', 'X-Theirs', 'header', 'x-theirs'],
  ['field', 'ours', 'theirs', 'field', 'theirs'],
  ['getKey', () => 'ours', text, 'getKey', text],
  ['keyFormat', 'uuid', 'structured', 'keyFormat', 'structured'],
  ['maxKeyLength', 10, 20, 'maxKeyLength', 20],
  ['required', true, false, 'required', false],
  ['scope', () => 'ours', text, 'scope', text],
  ['target', () => 'ours', text, 'target', text],
  ['fingerprint', text, false, 'fingerprint', false],
  ['hook', 'preParsing', 'preHandler', 'hook', 'preHandler'],
  ['onConflict', 'wait', 'reject', 'waits', false],
  ['waitTimeout', 10, 20, 'waitTimeout', 20],
  ['lease', 10, 20, 'lease', 20],
  ['onAbandoned', 'reject', 'rerun', 'reruns', true],
  ['ttl', 10, null, 'ttl', null],
  ['shouldStore', () => false, yes, 'shouldStore', yes],
  ['redact', (reply: unknown) => reply, text, 'redact', text],
  ['maxReplySize', 10, 20, 'maxReplySize', 20],
  ['maxStepsSize', 10, 20, 'maxStepsSize', 20],
  ['excludeHeaders', ['X-Ours'], ['X-Theirs'], 'excludeHeaders', new Set(['x-theirs'])],
  ['replayHeader', 'X-Ours', false, 'replayHeader', null],
  ['onStoreError', 'bypass', 'reject', 'bypasses', false],
  ['storeTimeout', 10, 20, 'storeTimeout', 20],
  ['problemDetails', true, false, 'problemDetails', false],
  ['documentationUrl', 'https://a.example/', 'https://b.example/', 'documentationUrl', 'https://b.example/']
]

t.test("a route overrides the plugin's options one by one, and inherits the others", async (t) => {
  // Stores are the same only if they are identical, which `strictSame` does not ask; functions, if they say the same.
  const shown = (value: unknown) => {
    if (value instanceof Set) return [...value].join()
    return typeof value === 'function' ? JSON.stringify(value({ kept: true })) : value
  }
  const equal = (a: unknown, b: unknown) => shown(a) === shown(b)
  for (const [name, plugin, route, member, expected] of overrides) {
    t.ok(equal(policy({ [name]: route }, { [name]: plugin })[member], expected), `${name} of the route`)
    const inherited = policy({}, { [name]: plugin })[member]
    t.ok(equal(inherited, policy({ [name]: plugin })[member]), `${name} of the plugin`)
    t.notOk(equal(inherited, expected), `${name} is told apart`)
  }
})

t.test('every duration may be a text', async (t) => {
  for (const name of ['ttl', 'lease', 'waitTimeout', 'storeTimeout'] as const) {
    t.equal(policy({ [name]: '90s' })[name], 90_000, name)
    t.equal(policy({}, { [name]: '2 minutes' })[name], 120_000, `${name} of the plugin`)
  }
})

t.test('an unfinished claim is remembered for the ttl, and for a day where replies are kept for ever', async (t) => {
  t.equal(policy({ ttl: 5_000 }).retain, 5_000)
  t.equal(policy({ ttl: null }).retain, 86_400_000)
})

t.test('a key format may be named that is the default', async (t) => {
  t.equal(policy({ keyFormat: 'any' }, { keyFormat: 'uuid' }).keyFormat, 'any')
})

t.test('a transaction needs a store that has them, and cannot do without its store', async (t) => {
  class Plain {}
  const store = Object.assign(new Plain(), storeWith({}))
  const begins = storeWith({ begin: yes })
  const bare = Object.assign(Object.create(null), store)
  const NEEDS = 'option "transaction" of POST /charges takes a store with transactions (PostgresStore), got'
  t.equal(
    refusal(() => policy({ transaction: true, store })),
    `${NEEDS} Plain`
  )
  t.equal(
    refusal(() => policy({ transaction: true }, { store })),
    `${NEEDS} Plain`
  )
  t.equal(
    refusal(() => policy({ transaction: true, store: bare })),
    `${NEEDS} object`
  )
  const bypassing = () => policy({ transaction: true, store: begins, onStoreError: 'bypass' })
  t.match(refusal(bypassing), /^option "transaction" of POST \/charges takes no onStoreError 'bypass'/)
  t.equal(policy({ transaction: true, store: begins }).transaction, true)
  t.equal(policy({ transaction: true, onStoreError: 'reject' }, { store: begins }).transaction, true)
  t.equal(policy({ transaction: false, store }).transaction, false)
  t.match(policy({ transaction: 'nested', store: begins }), { transaction: true, nested: true })
  t.equal(policy({ transaction: true }, { store: begins, transaction: 'nested' }).nested, false)
  t.equal(
    refusal(() => policy({ transaction: 'nested', store })),
    `${NEEDS} Plain`
  )
})

t.test('a transaction claims in preHandler, and nowhere else: bodies are not read on a connection', async (t) => {
  const store = storeWith({ begin: yes })
  t.equal(policy({ transaction: true, store }).hook, 'preHandler')
  t.equal(policy({ transaction: true, store, hook: 'preHandler' }).hook, 'preHandler')
  for (const hook of ['onRequest', 'preParsing', 'preValidation']) {
    const message = refusal(() => policy({ transaction: true, store, hook }))
    t.match(message, `option "transaction" of POST /charges takes no hook '${hook}'`)
  }
})

t.test('a scope of false says that callers are one, and no scope that their credentials are compared', async (t) => {
  for (const [options, scoped] of [
    [{}, false],
    [{ scope: false }, true],
    [{ scope: text }, true]
  ] as const) {
    t.equal(policy(options).scoped, scoped)
    t.equal(policy({}, options).scoped, scoped)
  }
  t.equal(policy({ scope: false }).scope, null)
})

t.test('a reply that says when to come back is not final', async (t) => {
  const hinting = (has: boolean) => ({ statusCode: 200, hasHeader: () => has }) as unknown as FastifyReply
  t.equal(isFinal({} as FastifyRequest, hinting(true)), false)
  t.equal(isFinal({} as FastifyRequest, hinting(false)), true)
})

/** A value, with what is said of it: what `inspect` says, and its type. */
function worded(value: unknown): [value: unknown, got: string] {
  if (value === null) return [value, 'null']
  return [value, `${inspect(value)} (${Array.isArray(value) ? 'array' : typeof value})`]
}
const NUMBERS = [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53, '10', 10n, true].map(worded)
const DURATION = "a positive integer of milliseconds or a text such as '24h'"
const DURATIONS = [0, -1, 1.5, Number.NaN, 2 ** 53, '0', '-1d', 'soon', '', '1e99 years', 10n, true].map(worded)
const BOOLEANS = ['true', 1, 0, null].map(worded)
const FUNCTIONS = ['user', true, null, {}].map(worded)
const HEADERS = [true, '', 'a b', 'ключ', 'a:', null, ['X-Key']].map(worded)
const storeWith = (members: object) => ({ acquire: yes, renew: yes, complete: yes, release: yes, ...members })

/** For each option of a route: what its message says it takes, and values it does not, with what is said of them. */
const wrong: Record<keyof IdempotencyRouteOptions, [takes: string, values: [value: unknown, got: string][]]> = {
  store: [
    'an IdempotencyStore (acquire, renew, complete and release)',
    [
      [null, 'null'],
      ['redis', "'redis' (string)"],
      [{}, '{} (object)'],
      [MemoryStore, '[class MemoryStore] (function)'],
      [storeWith({ release: undefined }), '(object)'],
      [storeWith({ acquire: true }), '(object)'],
      [Object.assign(() => {}, storeWith({})), '(function)'],
      [storeWith({ changed: true }), '(object)'],
      [storeWith({ get: true }), '(object)'],
      [storeWith({ delete: true }), '(object)'],
      [storeWith({ list: true }), '(object)'],
      [storeWith({ settle: true }), '(object)'],
      [storeWith({ begin: true }), '(object)'],
      [storeWith({ close: null }), '(object)']
    ]
  ],
  skip: ['a function', FUNCTIONS],
  header: ['a header name, or false', HEADERS],
  field: ['the name of a field', ['', false, null, ['key']].map(worded)],
  getKey: ['a function', FUNCTIONS],
  keyFormat: ["'any', 'uuid', 'structured' or a RegExp", ['UUID', '^k', '', true, null, yes, ['uuid']].map(worded)],
  maxKeyLength: ['a positive integer of bytes', [...NUMBERS, [null, 'null']]],
  required: ['true or false', BOOLEANS],
  scope: ['a function, or false', FUNCTIONS],
  target: ['a function that answers at once (not async)', [...FUNCTIONS, [async () => '/', '(function)']]],
  fingerprint: ['true, false or a function', ['body', null, 1].map(worded)],
  hook: [
    "'onRequest' or 'preParsing' or 'preValidation' or 'preHandler'",
    ['onSend', 'prehandler', 'constructor', ['onRequest'], null].map(worded)
  ],
  onConflict: ["'reject' or 'wait'", ['bypass', true, null].map(worded)],
  waitTimeout: [DURATION, [...DURATIONS, [null, 'null']]],
  lease: [DURATION, [...DURATIONS, [null, 'null']]],
  onAbandoned: ["'rerun' or 'reject'", ['wait', false, null].map(worded)],
  transaction: ["true, false or 'nested'", ['yes', null].map(worded)],
  ttl: [`${DURATION}, or null for ever`, DURATIONS],
  shouldStore: ['a function that answers at once (not async)', [...FUNCTIONS, [async () => true, '(function)']]],
  redact: ['a function that answers at once (not async)', [...FUNCTIONS, [async () => null, '(function)']]],
  maxReplySize: ['a positive integer of bytes', [...NUMBERS, [null, 'null']]],
  maxStepsSize: ['a positive integer of bytes', [...NUMBERS, [null, 'null']]],
  excludeHeaders: [
    'an array of header names',
    [
      ['x-id', "'x-id' (string)"],
      [['x-id', ''], "[ 'x-id', '' ] (array)"],
      [[false], '[ false ] (array)'],
      [new Set(['x-id']), '(object)'],
      [null, 'null']
    ]
  ],
  replayHeader: ['a header name, or false', HEADERS],
  onStoreError: ["'reject' or 'bypass'", ['rerun', false, null].map(worded)],
  storeTimeout: [DURATION, [...DURATIONS, [null, 'null']]],
  problemDetails: ['true or false', BOOLEANS],
  documentationUrl: [
    'an absolute URL',
    [
      ['/docs', "'/docs' (string)"],
      ['docs.example', "'docs.example' (string)"],
      ['https://docs.example/a b', "'https://docs.example/a b' (string)"],
      ['https://docs.example/>; rel="next"', '(string)'],
      [new URL('https://docs.example'), '(object)'],
      [null, 'null']
    ]
  ]
}

for (const [name, [takes, values]] of Object.entries(wrong)) {
  t.test(`a wrong ${name} is refused, with its name, what it takes and what it got`, async (t) => {
    for (const [value, got] of values) {
      for (const [where, build] of [
        ['', () => registered({ [name]: value })],
        [WHERE, () => declared({ [name]: value })]
      ] as const) {
        const message = refusal(build)
        const said = `option "${name}"${where} takes ${takes}, got `
        t.equal(message.slice(0, said.length), said)
        t.ok(message.slice(said.length).includes(got), `${message.slice(said.length)} has ${got}`)
      }
    }
  })
}

t.test('a wrong global is refused, with its name, what it takes and what it got', async (t) => {
  for (const [value, got] of BOOLEANS) {
    const message = refusal(() => registered({ global: value }))
    t.equal(message, `option "global" takes true or false, got ${got}`)
  }
})

t.test('wrong methods are refused, safe ones among them, whatever their case', async (t) => {
  const safe = [['POST', 'GET'], ['head'], ['OPTIONS'], ['TRACE'], ['Query']]
  const takes = 'an array of one or more methods that change something (not GET, HEAD, OPTIONS, TRACE, QUERY)'
  for (const [value, got] of [...safe, 'POST', [''], ['PO ST'], [1], [], null].map(worded)) {
    const message = refusal(() => registered({ methods: value }))
    t.equal(message, `option "methods" takes ${takes}, got ${got}`)
  }
})

t.test('methods that the server does not have are refused, with what it has', async (t) => {
  const supportedMethods = ['GET', 'HEAD', 'PUT', 'POST', 'MKCOL']
  const on = (methods?: string[]) => registrationOptions({ ...(methods && { methods }) }, { supportedMethods })
  for (const methods of [['ALL'], ['POTS'], ['POST', 'DELETE']]) {
    const message = refusal(() => on(methods))
    const takes =
      'methods that this server has: MKCOL, POST, PUT (and those of addHttpMethod, when it is called before)'
    t.equal(message, `option "methods" takes ${takes}, got ${inspect(methods)} (array)`)
  }
  t.strictSame([...on(['put', 'MKCOL']).methods], ['PUT', 'MKCOL'])
  t.strictSame([...on().methods], ['POST', 'PATCH'], 'the default fits every server')
})

t.test('global and methods are those of the registration, else of the one above, else the defaults', async (t) => {
  const under = (options: IdempotencyOptions, outer?: IdempotencyOptions) => {
    const { global, methods } = registrationOptions(options, { outer: outer && registered(outer) })
    return [global, ...methods]
  }
  t.strictSame(under({}), [false, 'POST', 'PATCH'])
  t.strictSame(under({}, {}), [false, 'POST', 'PATCH'])
  t.strictSame(under({}, { global: true, methods: ['put'] }), [true, 'PUT'])
  t.strictSame(under({ global: false }, { global: true, methods: ['put'] }), [false, 'PUT'])
  t.strictSame(under({ methods: ['delete'] }, { global: true, methods: ['put'] }), [true, 'DELETE'])
  const nothing = { global: undefined, methods: undefined } as object
  t.strictSame(under(nothing, { global: true, methods: ['put'] }), [true, 'PUT'])
})

t.test('methods may be in any case, and may be ones that Node does not know', async (t) => {
  t.strictSame([...registered({ methods: ['put', 'Delete', 'FOLD'] }).methods], ['PUT', 'DELETE', 'FOLD'])
})

t.test('what is in a value stays out of the message', async (t) => {
  class Client {
    password = 'secret'
  }
  const values = [
    new Client(),
    { password: 'secret' },
    [new Client()],
    Object.assign(() => {}, { password: 'secret' }),
    'redis://user:secret@localhost:6379',
    'postgres://user:sec@ret@localhost/db',
    ['redis://user:secret@localhost']
  ]
  for (const value of values) {
    for (const name of ['store', 'methods', 'keyFormat', 'hook', 'maxKeyLength']) {
      const message = refusal(() => registered({ [name]: value }))
      t.notMatch(message, /sec.?ret/, message)
    }
  }
})

t.test('what is taken for a store is told what to write', async (t) => {
  class Pool {
    totalCount = 0
    query() {}
    connect() {}
    end() {}
  }
  class PgClient {
    query() {}
    connect() {}
    end() {}
  }
  const redis = new Redis({ lazyConnect: true, password: 'secret' })
  const nodeRedis = { sendCommand() {}, multi() {}, isOpen: true }
  const decorated = { pool: new Pool(), query() {}, connect() {}, transact() {} }
  const mysqlDecorated = { pool: {}, query() {}, execute() {}, getConnection() {} }
  const values: [unknown, RegExp][] = [
    [redis, /got \[\w+\] \(object\): .*write new RedisStore\(client\)$/],
    [nodeRedis, /node-redis; write new RedisStore\(client\)$/],
    [new Pool(), /a pool of pg; write new PostgresStore\(\{ pool \}\)$/],
    [new PgClient(), /a client of pg; write new PostgresStore\(\{ pool \}\) with a pool$/],
    [decorated, /write new PostgresStore\(\{ pool: app\.pg\.pool \}\)$/],
    [createPool('mysql://user:secret@localhost/db'), /a pool of mysql2; write new MysqlStore\(\{ pool \}\)$/],
    [mysqlDecorated, /write new MysqlStore\(\{ pool: app\.mysql\.pool \}\)$/],
    [RedisStore, /\[class RedisStore\] \(function\): write new RedisStore\(…\)$/],
    [MemoryStore, /write new MemoryStore\(…\)$/],
    ['redis://localhost', /write new RedisStore\(new Redis\(…\)\) with ioredis$/],
    [{ get() {}, set() {} }, /got \[Object\] \(object\)$/],
    [() => {}, /\(function\)$/]
  ]
  for (const [value, said] of values) {
    const message = refusal(() => registered({ store: value }))
    t.match(message, said)
    t.match(
      refusal(() => declared({ store: value })),
      said
    )
  }
})

t.test('options that other tools hand to every plugin are not ours', async (t) => {
  const { routeDefaults } = registered({
    skipOverride: true,
    prefix: '/v1',
    bodyLimit: 1,
    trustProxy: true,
    ttl: 60_000
  })
  t.strictSame(Object.keys(routeDefaults), ['ttl', 'store'])
})

/** What is told of the durations of these options, each as `option "<name>" …`. */
async function durations(work: () => unknown): Promise<string[]> {
  return warningsOf('FST_IDEMPOTENCY_DURATION', work)
}

t.test('a duration that looks like seconds is told, once, with what it would be', async (t) => {
  const looks = {
    ttl: [30, 999, 3_600, 86_400, 604_800],
    lease: [30, 900],
    waitTimeout: [60, 120],
    storeTimeout: [2, 30]
  }
  for (const [name, values] of Object.entries(looks)) {
    for (const value of values) {
      const what = `option "${name}" is ${value} milliseconds: if ${value} seconds are meant, it is ${value * 1_000}`
      const told = await durations(() => {
        for (const _ of [1, 2]) policy(true, { [name]: value })
      })
      t.strictSame(
        told.filter((text) => !text.includes('storeTimeout (')),
        [what]
      )
      const ofRoute = await durations(() => policy({ [name]: value }))
      t.ok(ofRoute.includes(what.replace('" is', `"${WHERE} is`)), `${name} of a route`)
    }
  }
})

t.test('a duration that is short and meant is not', async (t) => {
  const told = await durations(() => {
    policy(true, { ttl: 1_000, storeTimeout: 250, waitTimeout: 500, lease: 1_000 })
    policy(true, { ttl: null })
    policy({ ttl: 3_600_000, lease: 60_000 })
    policy()
  })
  t.strictSame(told, [])
})

t.test('a lease that a slow store outlives is told where it is set', async (t) => {
  const says = (where: string, lease: number, storeTimeout: number) =>
    `option "lease"${where} is ${lease}, less than 3 × storeTimeout (${storeTimeout}): ` +
    'a store that is slow once lets a claim lapse while its handler runs'
  t.strictSame(await durations(() => policy(true, { lease: 5_999 })), [says('', 5_999, 2_000)])
  t.strictSame(await durations(() => policy(true, { storeTimeout: 10_001 })), [says('', 30_000, 10_001)])
  t.strictSame(await durations(() => policy({ storeTimeout: 4_000 }, { lease: 10_000 })), [says(WHERE, 10_000, 4_000)])
  t.strictSame(await durations(() => policy({ ttl: 60_000 }, { lease: 6_000 })), [])
})

t.test('a long value is cut in the message', async (t) => {
  const message = refusal(() => registered({ hook: 'x'.repeat(10_000) }))
  t.match(message, /got 'x{79} \(string\)$/)
})

t.test('an option that is not known is refused at the registration, and the known ones are listed', async (t) => {
  const typos = ['tll', 'Header', 'constructor', 'toString', 'hasOwnProperty', '']
  for (const name of typos) {
    const message = refusal(() => registered({ [name]: undefined }))
    const known = [...Object.keys(wrong), 'global', 'methods', 'secret'].join(', ')
    t.equal(message, `option "${name}" is not known; known are ${known}`)
  }
  const message = refusal(() => registered(JSON.parse('{"__proto__":{"ttl":1}}')))
  t.match(message, 'option "__proto__" is not known')
})

t.test("an option that is not known is refused at a route, and so are the registration's own", async (t) => {
  for (const name of ['tll', 'global', 'methods', 'secret', 'prefix', 'logLevel', 'logSerializers', 'constructor']) {
    const message = refusal(() => declared({ [name]: undefined }))
    t.equal(message, `option "${name}"${WHERE} is not known; known are ${Object.keys(wrong).join(', ')}`)
  }
})

t.test("prefix, logLevel and logSerializers are Fastify's, and ignored at the registration", async (t) => {
  const { routeDefaults } = registered({ prefix: '/v1', logLevel: 'warn', logSerializers: {}, ttl: 1 })
  t.strictSame(Object.keys(routeDefaults).sort(), ['store', 'ttl'])
})

t.test('an option that is undefined counts as left out', async (t) => {
  const none = Object.fromEntries([...Object.keys(wrong), 'global', 'methods'].map((name) => [name, undefined]))
  const { store: _a, ...rest } = policy(true, none)
  const { store: _b, ...defaults } = policy()
  t.strictSame(rest, defaults)
  const registration = registered(none)
  t.equal(registration.global, false)
  t.strictSame([...registration.methods], ['POST', 'PATCH'])
  t.equal(policy({ ttl: undefined, store: undefined }, { ttl: 1, store: ours }).ttl, 1)
  t.equal(policy({ store: undefined }, { store: ours }).store, ours)
})

t.test("changing the user's objects later changes nothing", async (t) => {
  const excludeHeaders = ['x-a']
  const methods = ['PUT']
  const options = { excludeHeaders, methods, global: true, ttl: 1 }
  const registration = registered(options)
  const own: { lease: number; excludeHeaders?: string[] } = { lease: 1 }
  const before = routePolicy({ method: 'PUT', url: '/', config: { idempotency: own } }, registration)
  excludeHeaders.push('x-b')
  methods.push('DELETE')
  Object.assign(options, { global: false, ttl: 2 })
  own.lease = 2
  const after = routePolicy({ method: 'PUT', url: '/' }, registration)
  t.ok(after, 'still global')
  t.equal(after?.ttl, 1)
  t.strictSame(after?.excludeHeaders, new Set(['x-a']))
  t.strictSame([...registration.methods], ['PUT'])
  t.equal(before?.lease, 1)
  const theirs = ['x-a']
  const excluding = policy({ excludeHeaders: theirs })
  theirs.push('x-b')
  t.strictSame(excluding.excludeHeaders, new Set(['x-a']))
})

t.test('nobody can change a policy, and options that are frozen are taken as well', async (t) => {
  const frozen = Object.freeze({ excludeHeaders: Object.freeze(['X-A']) })
  const made = policy(frozen, Object.freeze({ methods: Object.freeze(['PUT']) }))
  t.ok(Object.isFrozen(made))
  t.ok(Object.isFrozen(registered()))
  t.ok(Object.isFrozen(registered().routeDefaults))
  t.strictSame(made.excludeHeaders, new Set(['x-a']))
})

t.test("a global RegExp does not remember its last match, and the user's own is left alone", async (t) => {
  const theirs = /^K-\d+$/gi
  theirs.lastIndex = 3
  const { keyFormat } = policy({ keyFormat: theirs })
  if (!(keyFormat instanceof RegExp)) throw new Error('The RegExp is lost')
  t.not(keyFormat, theirs)
  t.equal(keyFormat.source, theirs.source)
  t.equal(keyFormat.ignoreCase, true)
  for (let i = 0; i < 3; i++) t.ok(keyFormat.test('k-1'))
  t.equal(keyFormat.lastIndex, 0)
  t.equal(theirs.lastIndex, 3)
})

t.test('header: false is refused where there is neither a field nor a getKey', async (t) => {
  for (const [config, options] of [
    [{ header: false }, {}],
    [true, { header: false }]
  ] as const) {
    const message = refusal(() => declared(config, options))
    t.equal(message, `option "header"${WHERE} takes false only together with "field" or "getKey"`)
  }
  t.equal(policy({ header: false, field: 'key' }).header, null)
  t.equal(policy({ header: false, getKey: () => 'key' }).header, null)
  t.equal(policy({ header: false }, { field: 'key' }).header, null)
  t.equal(policy({ field: 'key' }, { header: false }).header, null)
})

t.test('headers are known as they were configured, too, for people', async (t) => {
  for (const [given, known] of [
    ['X-Ours', 'X-Ours'],
    [false, null]
  ] as const) {
    t.equal(policy({ header: given, field: 'key' }).headerName, known)
    t.equal(policy({ replayHeader: given }).replayHeaderName, known)
  }
})

t.test('config.idempotency takes true, false or an object, and nothing else', async (t) => {
  for (const [value, got] of [null, 1, 0, '', 'true', ['wait'], () => true, Symbol('yes')].map(worded)) {
    const message = refusal(() => declared(value))
    t.equal(message, `config.idempotency${WHERE} takes true, false or an object, got ${got}`)
  }
})

t.test('without global only the routes that opt in are covered', async (t) => {
  t.ok(declared(true))
  t.ok(declared({}))
  t.ok(declared(true, {}, { method: 'DELETE' }), 'by any method that is not safe')
  t.equal(declared(false), null)
  t.equal(declared(undefined), null)
  t.equal(routePolicy({ method: 'POST', url: '/' }, registered()), null)
})

t.test('global covers the routes with a method in methods that do not opt out', async (t) => {
  const global = { global: true }
  for (const method of ['POST', 'PATCH']) t.ok(declared(undefined, global, { method }), method)
  for (const method of ['PUT', 'DELETE', 'GET']) t.equal(declared(undefined, global, { method }), null, method)
  t.ok(declared(undefined, { global: true, methods: ['PUT'] }, { method: 'PUT' }))
  t.equal(declared(undefined, { global: true, methods: ['PUT'] }), null)
  t.equal(declared(false, global), null)
  t.ok(declared(true, global, { method: 'PUT' }), 'by its own config')
  t.ok(routePolicy({ method: 'POST', url: '/' }, registered(global)), 'without any config')
})

t.test('a route that opts in with safe methods only is refused', async (t) => {
  for (const method of ['GET', 'HEAD', 'OPTIONS', 'TRACE', 'QUERY', ['GET', 'HEAD']]) {
    for (const config of [true, {}]) {
      const message = refusal(() => declared(config, { global: true }, { method, url: '/safe' }))
      const names = [method].flat().join('|')
      t.equal(message, `config.idempotency of ${names} /safe takes no route that has safe methods only`)
    }
    t.equal(declared(undefined, { global: true }, { method }), null, 'global leaves it alone')
    t.equal(declared(false, {}, { method }), null, 'and so may the route')
  }
})

t.test('in a route with several methods only those that change something are covered', async (t) => {
  t.strictSame(declared(true, {}, { method: ['GET', 'POST', 'DELETE'] })?.methods, new Set(['POST', 'DELETE']))
  t.equal(declared(true, {}, { method: ['POST', 'DELETE'] })?.methods, null, 'null stands for all')
  const global = { global: true }
  t.strictSame(declared(undefined, global, { method: ['PUT', 'POST'] })?.methods, new Set(['POST']))
  t.equal(declared(undefined, global, { method: ['PUT', 'DELETE'] }), null)
})

t.test('the plugin is concerned by the routes that it would cover or refuse', async (t) => {
  const concerned = (config: unknown, options: object, method: string | string[] = 'POST') =>
    concerns({ method, url: '/', config: { idempotency: config } }, registered(options))
  t.equal(concerned(true, {}), true)
  t.equal(concerned({ ttl: 1 }, {}), true)
  t.equal(concerned('nonsense', {}), true)
  t.equal(concerned(false, { global: true }), false)
  t.equal(concerned(undefined, {}), false)
  t.equal(concerned(undefined, { global: true }), true)
  t.equal(concerned(undefined, { global: true }, 'PUT'), false)
  t.equal(concerned(undefined, { global: true }, ['PUT', 'PATCH']), true)
  t.equal(concerns({ method: 'POST', url: '/' }, registered({ global: true })), true)
})

t.test('a route is described by its methods and its URL', async (t) => {
  t.equal(describeRoute({ method: 'POST', url: '/a' }), 'POST /a')
  t.equal(describeRoute({ method: ['PUT', 'POST'], url: '/a' }), 'PUT|POST /a')
})

t.test('shouldStore by default, and where it fails, is the same rule', async (t) => {
  t.strictSame(finals(isFinal), finals(policy().shouldStore))
})
