import t from 'tap'
import { encodeRecord } from '../../lib/stores/record-codec.js'
import type { Argument, RedisConnection, Result } from '../../lib/stores/redis/connection.js'
import { Listing, LOOK } from '../../lib/stores/redis/listing.js'
import { slotOf } from '../../lib/stores/redis/masters.js'
import { SCAN } from '../../lib/stores/redis/walk.js'
import type { ListedKind, StoredRecord } from '../../types/index.js'
import { reply, tombstone } from '../support/store-fixtures.js'

/* What a list asks of Redis, and what it makes of the answers. The connection is a fake: it may lie. */

const ALL: ListedKind[] = ['running', 'abandoned', 'reply', 'tombstone']
const RUN = 'aa11'
const info = (run = RUN) => Buffer.from(`# Server\r\nredis_version:7.0.15\r\nrun_id:${run}\r\ntcp_port:0\r\n`)
const scanned = (cursor: string, ...names: (string | Buffer)[]) => [
  Buffer.from(cursor),
  names.map((name) => Buffer.from(name))
]
const failure = (message: string) => Object.assign(new Error(message), { command: { args: ['secret'] } })

const owned = (kind: string) => `${kind}1\x01t`
const claimed = (kind = 'P', rest = '01:1000::theirs') => Buffer.from(owned(kind) + rest)
const recorded = (record: StoredRecord) => encodeRecord(record, Buffer.from(owned('C')))

interface Setup {
  /** What SCAN and INFO give. */
  scan?: (cursor: string) => readonly (Result | undefined)[]
  /** What is under a key: its value, and PTTL. */
  values?: Record<string, readonly [value: Buffer, left: unknown]>
  prefix?: string
  keyPrefix?: Argument
  /** Of a Cluster: what CLUSTER SLOTS gives, and what a master gives: its id, what SCAN, and what INFO. */
  slots?: () => unknown
  master?: (name: string, cursor: string) => readonly [id: unknown, scanned: unknown, info: unknown]
}

function open({ scan, values = {}, prefix = 'p:', keyPrefix = '', slots, master }: Setup = {}) {
  const sent: unknown[][] = []
  const evaluate = async (_: string, sha: string, keys: readonly string[], args: readonly Argument[]) => {
    if (sha === SCAN.sha) {
      sent.push(['scan of a master', ...args.map(String)])
      return master?.(keys[0] as string, String(args[0]))
    }
    t.equal(sha, LOOK.sha)
    sent.push(['look', keys, ...args])
    const [interest, last] = args as [string, string]
    return keys.map((key) => {
      const [value, left] = values[key.slice(prefix.length)] ?? []
      if (value === undefined || !interest.includes(value.toString('latin1', 0, 1))) return null
      return [last === '-1' ? value : value.subarray(0, Number(last) + 1), left]
    })
  }
  const connection = {
    isCluster: slots !== undefined,
    keyPrefix,
    scan: async (cursor: string, match: Buffer, count: number) => {
      sent.push(['scan', cursor, match.toString('latin1'), count])
      return (
        scan?.(cursor) ?? [
          [null, scanned('0', ...Object.keys(values).map((key) => keyPrefix + prefix + key))],
          [null, info()]
        ]
      )
    },
    slots: async () => slots?.(),
    evaluate
  }
  return { sent, listing: new Listing(connection as unknown as RedisConnection, prefix) }
}

t.test('a page is one SCAN and one look at all keys, in as many bytes as heads mostly have', async (t) => {
  const { sent, listing } = open({
    values: { a: [claimed(), 1_200], b: [recorded(reply()), -1], c: [recorded(tombstone('hijacked')), '5'] }
  })
  const { fingerprint, createdAt } = reply()
  t.strictSame(await listing.page(ALL, null), {
    keys: [
      { key: 'a', state: 'running', fingerprint: 'theirs', leaseMs: 200, attempt: 1 },
      { key: 'b', state: 'completed', fingerprint, createdAt, outcome: 201, ttlMs: null },
      { key: 'c', state: 'completed', fingerprint, createdAt, outcome: 'hijacked', ttlMs: 5 }
    ],
    cursor: null
  })
  t.strictSame(sent, [
    ['scan', '0', 'p:*', 300],
    ['look', ['p:a', 'p:b', 'p:c'], 'PPEACC', '2047']
  ])
})

t.test('what has lapsed is abandoned, and what was given back; what is remembered of a release is not', async (t) => {
  const values = {
    dead: [claimed(), 1_000],
    late: [claimed(), '400'],
    ended: [claimed('E', '02:1000::theirs'), 999],
    unused: [claimed('A', '02:1000::theirs'), 1],
    reserved: [claimed('P', '01:0::theirs'), 0],
    released: [Buffer.from(owned('R')), 5]
  } as const
  const { listing } = open({ values })
  const abandoned = { state: 'abandoned', fingerprint: 'theirs', attempt: 1 }
  t.strictSame((await listing.page(ALL, null)).keys, [
    { key: 'dead', ...abandoned, lapsedMs: 0 },
    { key: 'late', ...abandoned, lapsedMs: 600 },
    { key: 'ended', ...abandoned, attempt: 2, ended: true, lapsedMs: 1 },
    { key: 'unused', ...abandoned, attempt: 2, lapsedMs: 999 },
    { key: 'reserved', state: 'running', fingerprint: 'theirs', leaseMs: 0, attempt: 1 }
  ])
  const running = await listing.page(['running'], null)
  t.strictSame(
    running.keys.map(({ key }) => key),
    ['reserved']
  )
})

t.test('what is of no interest is not read', async (t) => {
  for (const [kinds, interest, expected] of [
    [['running'], 'P', ['a']],
    [['abandoned'], 'PEA', ['e']],
    [['reply'], 'C', ['b']],
    [['tombstone', 'running'], 'CP', ['a', 'c']],
    [[], '', []]
  ] as const) {
    const { sent, listing } = open({
      values: {
        a: [claimed(), 1_200],
        b: [recorded(reply()), 5],
        c: [recorded(tombstone('hijacked')), 5],
        e: [claimed('E'), 5]
      }
    })
    const { keys } = await listing.page(kinds, null)
    t.strictSame(
      keys.map(({ key }) => key),
      expected
    )
    t.equal(sent[1]?.[2], interest)
  }
})

t.test('what does not fit into the first bytes is read again, whole and alone', async (t) => {
  const headers = [['x-long', 'x'.repeat(3_000)]] as [string, string][]
  const steps = Buffer.alloc(8)
  steps.writeUInt32BE(1, 0)
  steps.writeUInt32BE(4_000, 4)
  const long = Buffer.concat([Buffer.from(`${owned('P')}01:1000:,6:theirs`), steps, Buffer.alloc(4_001, 'x')])
  const { sent, listing } = open({
    values: {
      body: [recorded(reply({ body: Buffer.alloc(10_000) })), 5],
      headers: [recorded(reply({ headers })), 5],
      steps: [long, 1_200]
    }
  })
  const { keys } = await listing.page(ALL, null)
  t.match(keys, [
    { key: 'body', outcome: 201 },
    { key: 'headers', outcome: 201 },
    { key: 'steps', leaseMs: 200 }
  ])
  t.notOk('steps' in (keys[2] as object))
  t.strictSame(
    sent.slice(2).map(([, names, , last]) => [names, last]),
    [
      [['p:headers'], '-1'],
      [['p:steps'], '-1']
    ]
  )
})

t.test('what is gone, or another one, when it is looked at again is what it is then', async (t) => {
  const long = recorded(reply({ headers: [['x-long', 'x'.repeat(3_000)]] }))
  for (const [then, expected] of [
    [undefined, []],
    [claimed(), [{ key: 'k', state: 'running' }]]
  ] as const) {
    const values: NonNullable<Setup['values']> = {}
    let looks = 0
    Object.defineProperty(values, 'k', {
      enumerable: true,
      get: () => (looks++ === 0 ? [long, 5] : then && [then, 1_200])
    })
    t.match((await open({ values }).listing.page(ALL, null)).keys, expected)
  }
})

t.test(
  'what is damaged, or of others, is left out, and is not read whole unless it looks like one of ours',
  async (t) => {
    const values = {
      ours: [claimed(), 1_200],
      garbage: [Buffer.from('Covered in {"json":true}'), -1],
      large: [Buffer.from(`Protocol ${'x'.repeat(5_000)}`), -1],
      version: [Buffer.from('C2\x01t'), 5],
      cut: [recorded(reply()).subarray(0, 40), 5],
      long: [Buffer.concat([Buffer.from(`${owned('C')}\x7f\x7f\x7f\x7f`), Buffer.alloc(3_000)]), 5],
      steps: [Buffer.concat([Buffer.from(`${owned('P')}01:1000:,6:theirs`), Buffer.alloc(9, 1)]), 1_200]
    } as const
    const { sent, listing } = open({ values })
    t.match(await listing.page(ALL, null), { keys: [{ key: 'ours' }], cursor: null })
    t.strictSame(
      sent.slice(2).map(([, names]) => names),
      [['p:long']]
    )
  }
)

t.test('an error of the server is one, without what it carries', async (t) => {
  const failing = async (setup: Setup, message: string | RegExp) => {
    const error = await open(setup)
      .listing.page(ALL, null)
      .catch((error) => error)
    t.match(error, { message })
    t.notOk('command' in error)
  }
  await failing(
    {
      scan: () => [
        [failure('LOADING'), undefined],
        [null, info()]
      ]
    },
    'LOADING'
  )
  await failing(
    {
      scan: () => [
        [null, scanned('0')],
        [failure('Socket closed'), undefined]
      ]
    },
    'Socket closed'
  )
  await failing(
    { slots: () => [], master: () => ['', scanned('0'), info()] },
    /No master of the Redis Cluster has the slots/
  )
})

t.test('the name of a key is what stands behind all prefixes, where it is text', async (t) => {
  for (const keyPrefix of ['outer:', Buffer.from([0xff, 0x2a])]) {
    const whole = (key: string | Buffer) => Buffer.concat([Buffer.from(keyPrefix), Buffer.from('p:'), Buffer.from(key)])
    const { sent, listing } = open({
      keyPrefix,
      scan: () => [
        [null, scanned('0', whole('é:b'), whole(Buffer.from([0x61, 0xff])))],
        [null, info()]
      ],
      values: { 'é:b': [claimed(), 1_200] }
    })
    t.match(await listing.page(ALL, null), { keys: [{ key: 'é:b' }] })
    t.strictSame(sent[1]?.[1], ['p:é:b'], 'the client puts its own prefix before it')
  }
})

t.test('glob characters in prefixes match themselves only', async (t) => {
  const { sent, listing } = open({ prefix: '[a-b]^?:', keyPrefix: '*\\' })
  await listing.page(ALL, null)
  t.equal(sent[0]?.[2], '\\*\\\\\\[a-b\\]^\\?:*')
})

/* Cursors */

t.test('the next page goes on where SCAN has stopped, at the same server', async (t) => {
  const { sent, listing } = open({
    scan: (cursor) => [
      [null, cursor === '0' ? scanned('17', 'p:a') : scanned('0', 'p:b')],
      [null, info()]
    ],
    values: { a: [claimed(), 1_200], b: [claimed(), 1_200] }
  })
  const first = await listing.page(ALL, null)
  t.match(first, { keys: [{ key: 'a' }], cursor: /17/ })
  const second = await listing.page(ALL, first.cursor)
  t.match(second, { keys: [{ key: 'b' }], cursor: null })
  t.strictSame([sent[0]?.[1], sent[2]?.[1]], ['0', '17'])
})

t.test('a page may be empty and not the last one, and then nothing is looked at', async (t) => {
  const { sent, listing } = open({
    scan: () => [
      [null, scanned('17')],
      [null, info()]
    ]
  })
  t.match(await listing.page(ALL, null), { keys: [], cursor: /17/ })
  t.equal(sent.length, 1)
})

t.test('another process of Redis does not understand the cursor, which is said', async (t) => {
  for (const [before, after] of [
    [
      [null, info()],
      [null, info('bb22')]
    ],
    [
      [null, info()],
      [failure('NOPERM no permissions'), undefined]
    ],
    [
      [failure('ERR unknown command'), undefined],
      [null, info()]
    ]
  ] as [Result, Result][]) {
    let told = before
    const { listing } = open({ scan: () => [[null, scanned('17')], told] })
    const { cursor } = await listing.page(ALL, null)
    told = after
    await t.rejects(listing.page(ALL, cursor), {
      message: /server that this cursor is from is gone.*list from the beginning/
    })
  }
})

t.test('a server that does not tell which process it is is walked all the same', async (t) => {
  for (const refusal of ['NOPERM no permissions', "ERR unknown command 'INFO', with args beginning with: 'server'"]) {
    const { listing } = open({
      scan: (cursor) => [
        [null, scanned(cursor === '0' ? '17' : '0')],
        [failure(refusal), undefined]
      ]
    })
    const { cursor } = await listing.page(ALL, null)
    t.strictSame(await listing.page(ALL, cursor), { keys: [], cursor: null })
  }
})

t.test('what is no cursor is refused', async (t) => {
  const { sent, listing } = open()
  for (const cursor of ['', '17', 'mine:k', '17 aa11 - 0 ', '-1 aa11 - 0', '17 AA11 - 0', '17 aa11 - x']) {
    await t.rejects(listing.page(ALL, cursor), { message: /no cursor of a RedisStore/ }, JSON.stringify(cursor))
  }
  t.strictSame(sent, [])
})

/* A Cluster of two masters, the ids of which are not in the order of their slots. */

const HALVES = [
  [0, 8_000, ['127.0.0.1', 7_000, 'b', []]],
  [8_001, 16_383, ['127.0.0.1', 7_001, 'a', []]]
]
const ownerOf = (name: string) => (slotOf(Buffer.from(name)) <= 8_000 ? 'b' : 'a')

function openCluster(pages: Record<string, Record<string, unknown[]>>, setup: Partial<Setup> = {}) {
  return open({
    slots: () => HALVES,
    master: (name, cursor) => {
      const id = ownerOf(name)
      return [Buffer.from(id), pages[id]?.[cursor], info(id === 'a' ? 'aa' : 'bb')]
    },
    values: Object.fromEntries(['k', 'l', 'm'].map((key) => [key, [claimed(), 1_200] as const])),
    ...setup
  })
}

const TWO = {
  a: { '0': scanned('9', 'p:k'), '9': scanned('0') },
  b: { '0': scanned('5', 'p:l', 'p:m'), '5': scanned('0') }
}

t.test('of a Cluster one master is walked after the other, and each key is looked at where it is', async (t) => {
  const { sent, listing } = openCluster(TWO)
  const pages: string[][] = []
  let cursor: string | null = null
  do {
    const page: Awaited<ReturnType<typeof listing.page>> = await listing.page(ALL, cursor)
    pages.push(page.keys.map(({ key }) => key))
    cursor = page.cursor
  } while (cursor !== null)
  t.strictSame(pages, [['k'], [], ['l', 'm'], []])
  t.strictSame(
    sent.filter(([what]) => what === 'look').map(([, keys]) => keys),
    [['p:k'], ['p:l'], ['p:m']]
  )
  t.strictSame(
    sent.filter(([what]) => what !== 'look').map(([, cursor, match, count]) => [cursor, match, count]),
    ['0', '9', '0', '5'].map((cursor) => [cursor, 'p:*', '300'])
  )
})

t.test('a cursor from other masters than there are by now is refused, which is said', async (t) => {
  const changes = {
    'a master that is gone': [[0, 16_383, HALVES[0]?.[2]]],
    'a replica in the place of its master': [HALVES[0], [8_001, 16_383, ['127.0.0.1', 7_002, 'c', []]]],
    'one more master': [HALVES[0], [8_001, 16_000, HALVES[1]?.[2]], [16_001, 16_383, ['127.0.0.1', 7_002, 'c', []]]],
    'a slot that has moved': [
      [0, 8_001, HALVES[0]?.[2]],
      [8_002, 16_383, HALVES[1]?.[2]]
    ]
  }
  for (const [what, now] of Object.entries(changes)) {
    let slots: unknown[] = HALVES
    const { listing } = openCluster(TWO, { slots: () => slots })
    const { cursor: within } = await listing.page(ALL, null)
    const { cursor: between } = await listing.page(ALL, within)
    slots = now
    for (const cursor of [within, between]) {
      await t.rejects(
        listing.page(ALL, cursor),
        { message: /masters of the Redis Cluster.*list from the beginning/ },
        what
      )
    }
  }
  const ofOneServer = `17 ${RUN} - 0`
  await t.rejects(openCluster(TWO).listing.page(ALL, ofOneServer), { message: /list from the beginning/ })
})

t.test('a master that was started anew does not understand the cursor', async (t) => {
  let run = 'aa'
  const { listing } = openCluster(TWO, { master: (_, cursor) => ['a', TWO.a[cursor as '0'], info(run)] })
  // Whichever of them is due, the first is `a`.
  const { cursor } = await listing.page(ALL, null)
  run = 'ff'
  await t.rejects(listing.page(ALL, cursor), { message: /server that this cursor is from is gone/ })
})

t.test('an answer of another master than the one whose turn it is counts for nothing', async (t) => {
  let misses = 2
  const master = (): [string, unknown, unknown] => [misses-- > 0 ? 'b' : 'a', TWO.a['0'], info()]
  const { listing } = openCluster(TWO, { master })
  t.match(await listing.page(ALL, null), { keys: [{ key: 'k' }] })
  misses = 3
  await t.rejects(listing.page(ALL, null), { message: /Another master/ })
})
