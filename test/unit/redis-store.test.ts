import t from 'tap'
import { RedisStore, type RedisStoreOptions } from '../../index.js'
import { encodeRecord } from '../../lib/stores/record-codec.js'
import type { RedisClient } from '../../lib/stores/redis/client.js'
import { ACQUIRE, COMPLETE, DELETE, RELEASE, RENEW, SETTLE, STEP, WATCH } from '../../lib/stores/redis/scripts.js'
import type { StoredRecord } from '../../types/index.js'
import { claim, reply, same, tombstone } from '../support/store-fixtures.js'

/* What a RedisStore says to its client, and what it makes of the answers. The client is a fake: it may lie. */

type Result = [error: Error | null, result: unknown]

const SCRIPTS = {
  acquire: ACQUIRE,
  renew: RENEW,
  step: STEP,
  complete: COMPLETE,
  release: RELEASE,
  watch: WATCH,
  settle: SETTLE,
  delete: DELETE
}
const nameOf = (sha: string) => Object.entries(SCRIPTS).find(([, script]) => script.sha === sha)?.[0]

const UNDECODABLE = /could not be decoded/
const UNREADABLE = { isFree: false, message: UNDECODABLE }
/** An error as ioredis has it: with the command, and what was in it. */
const failure = (message: string) => Object.assign(new Error(message), { command: { args: ['secret'] } })

interface Setup {
  /** The answer to the SET of an acquire. */
  set?: () => unknown
  /** The answers to the pipeline of a get: GET and PTTL. */
  piped?: (commands: unknown[][]) => Result[] | null
  scripted?: (script: string, args: unknown[]) => unknown
  isCluster?: boolean
  options?: RedisStoreOptions
}

function open({ set = () => null, piped = () => [], scripted = () => 1, isCluster, options = {} }: Setup = {}) {
  const sent: unknown[][][] = []
  const scripts: unknown[][] = []
  let configs = 0
  const pipeline = () => {
    const commands: unknown[][] = []
    const chain: object = new Proxy(
      {},
      {
        get: (_, name: string) =>
          name === 'exec'
            ? async () => {
                sent.push(commands)
                return piped(commands)
              }
            : (...args: unknown[]) => {
                commands.push([name, ...args])
                return chain
              }
      }
    )
    return chain
  }
  const client = {
    pipeline,
    setBuffer: async (...command: unknown[]) => {
      sent.push([['setBuffer', ...command]])
      return set()
    },
    evalshaBuffer: async (sha: string, keys: number, key: string, ...args: unknown[]) => {
      scripts.push([nameOf(sha), keys, key, ...args])
      return scripted(nameOf(sha) as string, args)
    },
    evalBuffer: () => t.fail('a script that is known'),
    duplicate: () => ({ on: () => {}, subscribe: async () => {}, unsubscribe: async () => {}, disconnect: () => {} }),
    config: async () => {
      configs++
      return ['maxmemory', '0']
    },
    stream: {} as unknown,
    ...(isCluster === undefined ? {} : { isCluster })
  }
  const store = new RedisStore(client as unknown as RedisClient, options)
  return { client, scripts, sent, store, configs: () => configs }
}

const owned = (kind: string, token: string) => `${kind}1${String.fromCharCode(token.length)}${token}`
const claimed = (token: string, { attempt = '1', retainMs = 1_000, fingerprint = 'theirs' } = {}) =>
  Buffer.from(`${owned('P', token)}0${attempt}:${retainMs}::${fingerprint}`)
/** What a claim has left behind, or one that took over: with what it has found. */
const later = (kind: string, rest: string) => Buffer.from(`${owned(kind, 'other')}02:1000:${rest}`)
/** A step as it is kept: the lengths of its name and its result, and both. */
const kept = (name: string, result: string) => {
  const lengths = Buffer.alloc(8)
  lengths.writeUInt32BE(Buffer.byteLength(name), 0)
  lengths.writeUInt32BE(Buffer.byteLength(result), 4)
  return Buffer.concat([lengths, Buffer.from(name + result)])
}
const recorded = (record: StoredRecord, token = 't') => encodeRecord(record, Buffer.from(owned('C', token)))
/** What is told of the claim of somebody else. */
const running = { state: 'running', fingerprint: 'theirs', attempt: 1 }
const mine = claim({ token: 'mine', fingerprint: 'f', leaseMs: 500, retainMs: 1_000 })
/** What an acquire makes of what is there, with so much left. */
const acquiring = (found: unknown, left: unknown = 1_200, scripted: Setup['scripted'] = () => [0, found, left, 0]) =>
  open({
    set: () => found,
    piped: () => [
      [null, found],
      [null, left]
    ],
    scripted
  })

t.test('a client is what has the methods of ioredis, or of a kind of node-redis', async (t) => {
  const code = 'FST_IDEMPOTENCY_INVALID_OPTION'
  const some = (...methods: string[]) => Object.fromEntries(methods.map((method) => [method, () => {}]))
  const nodeRedis = some('sendCommand', 'withTypeMapping', 'connect')
  const kinds = [
    { ...nodeRedis, ...some('duplicate', 'subscribe', 'destroy') },
    { ...nodeRedis, ...some('execute'), totalClients: 0 },
    { ...nodeRedis, ...some('getSentinelNode', '_execute') },
    { ...nodeRedis, ...some('nodeClient'), masters: [] }
  ]
  for (const kind of kinds) {
    t.doesNotThrow(() => new RedisStore(kind as never))
    for (const missing of Object.keys(kind)) {
      t.throws(
        () => new RedisStore({ ...kind, [missing]: undefined } as never),
        { code },
        `${Object.keys(kind)} - ${missing}`
      )
    }
  }
  // Scripts and modules of the caller's are methods as well.
  t.doesNotThrow(() => new RedisStore({ ...kinds[0], ...some('execute', 'nodeClient') } as never))
  for (const missing of ['pipeline', 'setBuffer', 'evalshaBuffer', 'evalBuffer', 'duplicate']) {
    const { client } = open()
    t.throws(() => new RedisStore({ ...client, [missing]: undefined } as never), { code }, missing)
  }
})

t.test(
  'a client that is none is refused, with words on what to take instead and nothing of what is in it',
  async (t) => {
    const none = (): void => {}
    const secret = { url: 'redis://:secret@host' }
    for (const [given, got] of [
      ['redis://:secret@host', /a value of type string/],
      [secret, /a value of type object/],
      [undefined, /a value of type undefined/],
      [null, /a value of type object/],
      [{ sendCommand: none, multi: none, options: secret }, /node-redis 4, or like its legacy\(\) interface/],
      [{ customCommand: none, invokeScript: none, config: secret }, /valkey-glide/],
      [{ pipeline: none, evalsha: none, createScript: none, client: secret }, /Upstash: connect by its rediss:\/\//]
    ] as const) {
      const error = t.throws(() => new RedisStore(given as never), { code: 'FST_IDEMPOTENCY_INVALID_OPTION' }) as Error
      t.match(error.message, /ioredis, iovalkey or node-redis.*new RedisStore\(new Redis\(url\)\).*; got /)
      t.match(error.message, got)
      t.notMatch(error.message, /secret/)
    }
  }
)

t.test('options that are unknown or invalid are refused, by name', async (t) => {
  for (const [options, message] of [
    [{ prefix: 'x' }, /RedisStore option "prefix" is not known/],
    [{ keyPrefix: 5 }, /"keyPrefix" takes a string, got 5/],
    [{ replicas: -1 }, /"replicas" takes a number of replicas, got -1/],
    [{ replicas: 1.5 }, /"replicas" takes a number of replicas, got 1.5/],
    [{ replicas: '1' }, /"replicas" takes a number of replicas, got '1'/],
    [
      { replicaTimeout: 0 },
      /"replicaTimeout" takes a positive integer of milliseconds or a text such as '24h', got 0 \(number\)/
    ],
    [{ replicaTimeout: -1 }, /"replicaTimeout" takes/],
    [{ replicaTimeout: 1.5 }, /"replicaTimeout" takes/]
  ] as const) {
    t.throws(() => open({ options: options as never }), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message })
  }
  t.throws(() => open({ options: { replicas: 1 }, isCluster: true }), { message: /"replicas" takes no Cluster/ })
  for (const isCluster of [undefined, false]) {
    t.doesNotThrow(() => open({ options: { replicas: 1 }, ...(isCluster === false && { isCluster }) }))
  }
  t.doesNotThrow(() => open({ options: { replicas: 0, replicaTimeout: 1, keyPrefix: '' }, isCluster: true }))
})

t.test('a free key is claimed by one SET', async (t) => {
  for (const isCluster of [false, true]) {
    const { configs, scripts, sent, store } = open({ isCluster })
    t.strictSame(await store.acquire('k', mine), { state: 'acquired', attempt: 1 })
    t.strictSame(sent, [[['setBuffer', 'idempotency:k', 'P1\x04mine01:1000::f', 'PX', '1500', 'NX', 'GET']]])
    await store.acquire('l', mine)
    t.equal(configs(), 1, 'the server is asked once whether it evicts')
    t.strictSame(scripts, [])
  }
})

t.test('a record is understood without a script, and by one command where nobody wants to know its ttl', async (t) => {
  const record = reply()
  const found = acquiring(recorded(record), 700)
  same(t, await found.store.acquire('k', { ...mine, withTtl: false }), record)
  t.equal(found.sent.length, 1)
  same(t, await found.store.acquire('k', { ...mine, withTtl: true }), record)
  t.equal(found.sent.length, 3)
  t.strictSame(found.scripts, [])
  for (const left of [-1, 0, 700]) {
    const ttlMs = left === -1 ? null : left
    t.match(await acquiring(recorded(tombstone('hijacked')), left).store.acquire('k', { ...mine, withTtl: true }), {
      state: 'completed',
      ttlMs
    })
  }
})

t.test('a record that goes between two looks at it leaves a key that is free', async (t) => {
  const { scripts, store } = open({
    set: () => recorded(reply()),
    piped: () => [
      [null, null],
      [null, -2]
    ],
    scripted: () => [1]
  })
  t.strictSame(await store.acquire('k', { ...mine, withTtl: true }), { state: 'acquired', attempt: 1 })
  t.equal(scripts.length, 1)
})

t.test('one who is only named like the other is somebody else', async (t) => {
  for (const token of ['min', 'mine2', 'Mine']) {
    t.match(await acquiring(claimed(token)).store.acquire('k', mine), { state: 'running' }, token)
  }
  const long = { ...mine, token: 't'.repeat(100) }
  t.match(await acquiring(claimed('t', { fingerprint: '' })).store.acquire('k', long), { state: 'running' })
})

t.test('all else is decided by the script: an own claim, a lapsed one, a released key', async (t) => {
  for (const [what, set, left] of [
    ['an own claim', claimed('mine'), 1_200],
    ['a claim that has just lapsed', claimed('other'), 1_000],
    ['a claim that took over and was given back', later('E', ':theirs'), 1_000],
    ['the same, given back unused', later('A', ':theirs'), 1_000],
    ['a released key', Buffer.from(owned('R', 'other')), 60_000],
    ['something else', 'OK', 1_200],
    ['a Redis that gives nothing', undefined, undefined]
  ] as const) {
    const { scripts, store } = acquiring(set, left, () => ['3', null, null, null])
    t.strictSame(await store.acquire('k', mine), { state: 'acquired', attempt: 3 }, what)
    t.strictSame(scripts, [['acquire', 1, 'idempotency:k', 'P1\x04mine', '1000', 'f', '1500', '0']])
  }
  const { scripts, store } = acquiring(claimed('mine'), 1_200, () => [1])
  await store.acquire('k', { ...mine, takeover: true })
  t.equal(scripts[0]?.at(-1), '1')
})

t.test('what the script has found', async (t) => {
  const found = (...reply: unknown[]) => acquiring(undefined, undefined, () => reply).store.acquire('k', mine)
  t.strictSame(await found(0, claimed('other'), '1200', 0), { ...running, leaseMs: 200 })
  t.strictSame(await found('0', claimed('other'), 900, '0'), { ...running, leaseMs: 0 })
  t.strictSame(await found(0, claimed('other', { attempt: '12' }), 900, '1'), {
    state: 'abandoned',
    fingerprint: 'theirs',
    attempt: 12,
    lapsedMs: 100
  })
  const abandoned = { state: 'abandoned', fingerprint: 'theirs', attempt: 2, lapsedMs: 100 }
  t.strictSame(await found(0, later('P', 'A7:foundétheirs'), 900, 1), abandoned)
  t.strictSame(await found(0, later('P', 'E0:theirs'), 900, 1), abandoned)
  t.strictSame(await found(0, later('A', ':theirs'), 900, 1), abandoned)
  t.strictSame(await found(0, later('E', ':theirs'), 900, 1), { ...abandoned, ended: true })
  t.match(await found(0, recorded(reply()), -1, 0), { state: 'completed', ttlMs: null })
  await t.rejects(found(0, Buffer.from('X1\x01t'), 5, 0), UNDECODABLE)
})

t.test('a server that does not take NX with GET gets the script from then on', async (t) => {
  const { scripts, sent, store } = open({
    set: () => {
      throw failure('ERR syntax error')
    },
    scripted: () => [1]
  })
  for (const key of ['k', 'l']) t.match(await store.acquire(key, mine), { state: 'acquired' })
  t.equal(sent.length, 1)
  t.equal(scripts.length, 2)
})

t.test('any other error is the answer, without what it carries', async (t) => {
  for (const [message, isCluster] of [
    ['OOM', false],
    ['CLUSTERDOWN', true]
  ] as const) {
    const fails = () => {
      throw failure(message)
    }
    const error = await open({ set: fails, isCluster })
      .store.acquire('k', mine)
      .catch((error) => error)
    t.match(error, { message })
    t.notOk('command' in error)
  }
})

t.test('tokens of all lengths are framed', async (t) => {
  for (const [length, isText] of [
    [1, true],
    [127, true],
    [128, false],
    [255, false]
  ] as const) {
    const token = 't'.repeat(length)
    const { scripts, sent, store } = open()
    await store.acquire('k', { ...mine, token })
    const value = sent[0]?.[0]?.[2] as string | Buffer
    t.equal(typeof value === 'string', isText)
    const expected = Buffer.concat([Buffer.from([0x50, 0x31, length]), Buffer.from(`${token}01:1000::f`)])
    t.strictSame(Buffer.from(value as string), expected)
    await store.release('k', token)
    t.strictSame(Buffer.from(scripts[0]?.[3] as string), expected.subarray(0, 3 + length))
  }
  const { store } = open()
  for (const token of ['', 't'.repeat(256)]) {
    const message = 'A token is 1 to 255 bytes long'
    await t.rejects(store.acquire('k', { ...mine, token }), { message })
    await t.rejects(store.complete('k', token, reply(), 5), { message })
    await t.rejects(store.release('k', token), { message })
    await t.rejects(store.step('k', token, ['a', 'b']), { message })
    await t.rejects(store.renew('k', token, 5), { message })
  }
})

t.test('a reply is stored by one script, as text where that is cheaper', async (t) => {
  for (const [body, isText] of [
    ['{"ok":true}', true],
    ['é', false],
    ['x'.repeat(16_000), true],
    ['x'.repeat(17_000), false]
  ] as const) {
    const { scripts, store } = open()
    const record = reply({ body: Buffer.from(body) })
    t.equal(await store.complete('k', 't', record, 700), true)
    const [name, keys, key, owner, value, ...rest] = scripts[0] as [string, number, string, string, string | Buffer]
    t.strictSame([name, keys, key, owner], ['complete', 1, 'idempotency:k', 'P1\x01t'])
    t.strictSame(rest, ['700', 'idempotency:k'])
    t.equal(typeof value === 'string', isText)
    t.strictSame(typeof value === 'string' ? Buffer.from(value, 'latin1') : value, recorded(record))
  }
  const { scripts, store } = open()
  await store.complete('k', 't', reply(), null)
  t.equal(scripts[0]?.[5], '', 'for ever')
})

t.test('text is cheaper up to 16 KiB, envelope and all', async (t) => {
  const lengthOf = (size: number) => recorded(reply({ body: Buffer.alloc(size, 'x') })).length
  const envelope = lengthOf(0)
  for (const [length, isText] of [
    [16_384, true],
    [16_385, false]
  ] as const) {
    const { scripts, store } = open()
    await store.complete('k', 't', reply({ body: Buffer.alloc(length - envelope, 'x') }), 5)
    const value = scripts[0]?.[4] as string
    t.same([value.length, typeof value === 'string'], [length, isText])
  }
})

t.test('yes is one, in whatever form, and all else is no', async (t) => {
  for (const [answer, is] of [
    [1, true],
    ['1', true],
    [Buffer.from('1'), true],
    [0, false],
    [null, false]
  ] as const) {
    const { store } = open({ scripted: () => answer })
    t.equal(await store.complete('k', 't', reply(), 5), is)
    t.equal(await store.release('k', 't'), is)
    t.equal(await store.delete('k'), is)
  }
})

t.test('a claim is renewed by its key and owner', async (t) => {
  const { scripts, store } = open({ scripted: () => [1] })
  t.equal(await store.renew('k', 't', 500), true)
  t.strictSame(scripts, [['renew', 1, 'idempotency:k', 'P1\x01t', '500']])
})

t.test('a key is given back by one script, and remembers for a minute who did it', async (t) => {
  const { scripts, store } = open()
  await store.release('k', 't')
  await store.release('k', 't', true)
  t.strictSame(scripts, [
    ['release', 1, 'idempotency:k', 'P1\x01t', '0', '60000', 'idempotency:k'],
    ['release', 1, 'idempotency:k', 'P1\x01t', '1', '60000', 'idempotency:k']
  ])
  await store.delete('k')
  await store.delete('k', true)
  t.strictSame(scripts.slice(2), [
    ['delete', 1, 'idempotency:k', 'idempotency:k'],
    ['delete', 1, 'idempotency:k', 'idempotency:k', '1']
  ])
})

t.test('what is no string is nobody’s claim, and other errors are errors', async (t) => {
  const failing = (message: string) =>
    open({
      scripted: () => {
        throw failure(message)
      }
    }).store
  const wrongType = failing('WRONGTYPE Operation against a key holding the wrong kind of value')
  t.equal(await wrongType.release('k', 't'), false)
  t.equal(await wrongType.step('k', 't', ['a', 'b']), false)
  for (const settlement of ['ended', { record: reply(), ttlMs: 5 }] as const) {
    t.equal(await wrongType.settle('k', 'f', settlement), false)
    await t.rejects(failing('READONLY').settle('k', 'f', settlement), { message: 'READONLY' })
  }
  await t.rejects(failing('READONLY').release('k', 't'), { message: 'READONLY' })
  await t.rejects(failing('READONLY').step('k', 't', ['a', 'b']), { message: 'READONLY' })
})

t.test('a step is kept by one script, with its name and its result', async (t) => {
  const { scripts, sent, store } = open()
  t.equal(await store.step('k', 't', ['charge', '{"id":1}']), true)
  t.strictSame(scripts, [['step', 1, 'idempotency:k', 'P1\x01t', 'charge', '{"id":1}']])
  t.strictSame(sent, [])
  t.equal(await open({ scripted: () => 0 }).store.step('k', 't', ['charge', '']), false)
})

t.test('what nobody is running is settled by one script, in the name of nobody', async (t) => {
  const { scripts, sent, store } = open()
  const record = reply()
  t.equal(await store.settle('k', 'a "b"', { record, ttlMs: 700 }), true)
  t.equal(await store.settle('k', 'f', { record, ttlMs: null }), true)
  t.equal(await store.settle('k', 'f', 'ended'), true)
  const [first, forEver, ended] = scripts as [string, number, string, string, string, string, string?, string?][]
  const tokenOf = (value = '') => value.slice(3, 3 + value.charCodeAt(2))
  const value = (token: string) => recorded(record, token).toString('latin1')
  t.strictSame(first, [
    ...['settle', 1, 'idempotency:k', 'a "b"', 'idempotency:k'],
    ...[value(tokenOf(first?.[5])), '["a \\"b\\"",', '700']
  ])
  t.strictSame(forEver?.slice(5), [value(tokenOf(forEver?.[5])), '["f",', ''])
  t.strictSame(ended?.slice(3), ['f', 'idempotency:k', owned('E', tokenOf(ended?.[5]))])
  const tokens = [first, forEver, ended].map((args) => tokenOf(args?.[5]))
  t.equal(new Set(tokens).size, 3)
  for (const token of tokens) t.match(token, /^[\w-]{16}$/)
  t.strictSame(sent, [])
  t.equal(await open({ scripted: () => 0 }).store.settle('k', 'f', 'ended'), false)
})

t.test('steps are read behind the fingerprint, whose length is told then', async (t) => {
  const steps = [
    ['', ''],
    ['é\0', '{"a":"b"}'],
    ['c', '🔑'.repeat(100)]
  ] as const
  const bytes = Buffer.concat(steps.map(([name, result]) => kept(name, result)))
  const claimOf = (kind: string, rest: string) => Buffer.concat([later(kind, rest), bytes])
  const found = (value: Buffer, abandoned: number) =>
    acquiring(undefined, undefined, () => [0, value, 900, abandoned]).store.acquire('k', mine)
  t.strictSame(await found(claimOf('P', ',3:é1'), 0), {
    state: 'running',
    fingerprint: 'é1',
    leaseMs: 0,
    attempt: 2,
    steps
  })
  t.strictSame(await found(claimOf('P', 'A7,6:foundétheirs'), 1), {
    state: 'abandoned',
    fingerprint: 'theirs',
    attempt: 2,
    lapsedMs: 100,
    steps
  })
  t.strictSame(await found(claimOf('E', ',0:'), 1), {
    state: 'abandoned',
    fingerprint: '',
    attempt: 2,
    ended: true,
    lapsedMs: 100,
    steps
  })
  const live = await acquiring(claimOf('P', ',6:theirs')).store.acquire('k', mine)
  t.strictSame(live, { ...running, leaseMs: 200, attempt: 2, steps }, 'without a script')
  const ours = await acquiring(claimed('mine'), 1_200, () => ['2', bytes]).store.acquire('k', mine)
  t.strictSame(ours, { state: 'acquired', attempt: 2, steps })
})

t.test('steps that are not whole are an error', async (t) => {
  const whole = Buffer.concat([kept('a', 'first'), kept('b', 'second')])
  const boundary = kept('a', 'first').length
  for (let length = 1; length < whole.length; length++) {
    if (length === boundary) continue
    const cut = whole.subarray(0, length)
    const value = Buffer.concat([later('P', ',6:theirs'), cut])
    await t.rejects(acquiring(value).store.acquire('k', mine), UNREADABLE, `a conflict, ${length} bytes`)
    const taken = acquiring(undefined, undefined, () => [2, cut]).store.acquire('k', mine)
    await t.rejects(taken, UNREADABLE, `a takeover, ${length} bytes`)
  }
  for (const rest of [',6:theirs', ',7:theirs', ',999:theirs', ',:theirs', ',6']) {
    await t.rejects(acquiring(later('P', rest)).store.acquire('k', mine), UNREADABLE, rest)
  }
})

t.test('what is there is read by GET and PTTL', async (t) => {
  const got = (value: unknown, left: unknown = 1_200) =>
    open({
      piped: () => [
        [null, value],
        [null, left]
      ]
    })
  const { sent, store } = got(claimed('other'))
  t.strictSame(await store.get('k'), { ...running, leaseMs: 200 })
  t.strictSame(sent, [
    [
      ['getBuffer', 'idempotency:k'],
      ['pttl', 'idempotency:k']
    ]
  ])
  const abandoned = { state: 'abandoned', fingerprint: 'theirs', attempt: 1 }
  for (const [left, lapsedMs] of [
    [1_000, 0],
    ['999', 1],
    [0, 1_000],
    [-2, 1_000]
  ] as const) {
    t.strictSame(await got(claimed('other'), left).store.get('k'), { ...abandoned, lapsedMs }, `${left} ms are left`)
  }
  t.strictSame(await got(later('E', ':theirs'), 400).store.get('k'), {
    ...abandoned,
    attempt: 2,
    ended: true,
    lapsedMs: 600
  })
  t.strictSame(await got(claimed('other'), '1001').store.get('k'), { ...running, leaseMs: 1 })
  t.match(await got(recorded(reply()), 700).store.get('k'), { state: 'completed', ttlMs: 700 })
  t.match(await got(recorded(reply()), -2).store.get('k'), { state: 'completed', ttlMs: 0 }, 'gone between the two')
  for (const nothing of [null, undefined, 'text', Buffer.from(owned('R', 't'))]) {
    t.equal(await got(nothing).store.get('k'), null)
  }
  t.equal(await open({ piped: () => null }).store.get('k'), null)
})

t.test('a look that fails is an error, without what it carries', async (t) => {
  for (const results of [
    [
      [failure('LOADING'), undefined],
      [null, 5]
    ],
    [
      [null, claimed('t')],
      [failure('LOADING'), undefined]
    ]
  ] as Result[][]) {
    const error = await open({ piped: () => results })
      .store.get('k')
      .catch((error) => error)
    t.match(error, { message: 'LOADING' })
    t.notOk('command' in error)
  }
  const throwing = open({
    piped: () => {
      throw failure('LOADING')
    }
  })
  const error = await throwing.store.get('k').catch((error) => error)
  t.match(error, { message: 'LOADING' })
  t.notOk('command' in error)
})

t.test('what is not one of ours is an error, not a claim', async (t) => {
  for (const value of [
    '',
    'P',
    'P1',
    'P2\x01t01:1000::f',
    'P1\x01t21:1000::f',
    'P1\x01tx01:1000::f',
    'P1\x01t0:1000::f',
    'P1\x01t01:1000',
    'P1\x01t01:1000:',
    'P1\x01t01:1000:f',
    'P1\x01t01:x::f',
    'P1\x01t01:1000:X1:ff',
    'E1\x01t01:1000',
    'X1\x01t01:1000::f',
    'C1\x01t'
  ]) {
    const get = open({
      piped: () => [
        [null, Buffer.from(value)],
        [null, 5]
      ]
    }).store.get('k')
    await t.rejects(get, UNDECODABLE, JSON.stringify(value))
  }
})

t.test('fingerprints may have line breaks, and attempts several digits', async (t) => {
  const value = claimed('t', { attempt: '10', fingerprint: 'a\nb:c' })
  const { store } = open({
    piped: () => [
      [null, value],
      [null, 5]
    ]
  })
  t.strictSame(await store.get('k'), { state: 'abandoned', fingerprint: 'a\nb:c', attempt: 10, lapsedMs: 995 })
})

t.test('keys have the prefix that was chosen', async (t) => {
  const { sent, scripts, store } = open({ options: { keyPrefix: 'mine:' } })
  await store.get('k')
  await store.delete('k')
  t.strictSame(sent[0]?.[0], ['getBuffer', 'mine:k'])
  t.strictSame(scripts[0], ['delete', 1, 'mine:k', 'mine:k'])
})

t.test('who waits looks by a script, once it listens', async (t) => {
  const { client, scripts, store } = open({ scripted: () => 0 })
  const calls: string[] = []
  const subscriber = {
    on: () => {},
    subscribe: async (channel: string) => void calls.push(channel),
    unsubscribe: async () => {},
    disconnect: () => calls.push('disconnect')
  }
  Object.assign(client, { duplicate: () => subscriber })
  await store.changed('k', new AbortController().signal)
  t.strictSame(scripts, [['watch', 1, 'idempotency:k']])
  await store.close()
  t.strictSame(calls, ['idempotency:k', 'disconnect'])
})

/* Replicas */

const replicated = (piped: Setup['piped'], options: RedisStoreOptions = { replicas: 2, replicaTimeout: 50 }) =>
  open({ ...(piped && { piped }), options })

t.test('a reply counts as stored when enough replicas have it', async (t) => {
  for (const reached of [2, '3']) {
    const { scripts, sent, store } = replicated(() => [
      [null, 'OK'],
      [null, reached]
    ])
    t.equal(await store.complete('k', 't', reply(), 5), true)
    t.equal(scripts.length, 1)
    t.strictSame(sent, [
      [
        ['set', 'idempotency:replicated', '', 'PX', 50],
        ['wait', 2, 50]
      ]
    ])
  }
})

t.test('too few replicas are an error', async (t) => {
  for (const [results, message] of [
    [
      [
        [null, 'OK'],
        [null, 1]
      ],
      '1 of 2 replicas have the reply'
    ],
    [[[null, 'OK']], 'NaN of 2 replicas have the reply'],
    [
      [
        [null, 'OK'],
        [failure('UNBLOCKED'), undefined]
      ],
      'UNBLOCKED'
    ],
    [
      [
        [failure('READONLY'), undefined],
        [null, 2]
      ],
      'READONLY'
    ]
  ] as [Result[], string][]) {
    const error = await replicated(() => results)
      .store.complete('k', 't', reply(), 5)
      .catch((error) => error)
    t.match(error, { message })
    t.notOk('command' in error)
  }
})

t.test('what was written by a connection that is no more may be on no replica', async (t) => {
  const { client, store } = replicated(() => {
    client.stream = {}
    return [
      [null, 'OK'],
      [null, 2]
    ]
  })
  await t.rejects(store.complete('k', 't', reply(), 5), { message: /connection to Redis was lost/ })
})

t.test('what was not stored is not waited for', async (t) => {
  const { sent, store } = open({ scripted: () => 0, options: { replicas: 1 } })
  t.equal(await store.complete('k', 't', reply(), 5), false)
  t.strictSame(sent, [])
})

t.test('without the option, nobody waits for replicas', async (t) => {
  const { sent, store } = open()
  await store.complete('k', 't', reply(), 5)
  t.strictSame(sent, [])
})
