import { getEventListeners } from 'node:events'
import t from 'tap'
import { IdempotentFetchError, type IdempotentFetchOptions, idempotentFetch } from '../../lib/client.js'
import { virtualTime } from '../support/client-time.js'

/* The helper for clients: what it sends, when it sends it again, and what it gives back. */

const URL_ = 'https://api.example.com/charges'
const UUID_V4 = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/

type Tap = { teardown(fn: () => unknown): void }
type Answering = (request: Request, attempt: number) => Response | Promise<Response>

/** A server that answers by a script, the last line again and again; and what it has got, when. */
function server(t: Tap, ...script: (Answering | Response)[]) {
  const time = virtualTime(t)
  const requests: { at: number; key: string | null; method: string; body: string; headers: Headers }[] = []
  const fetch = async (request: Request) => {
    const { method, headers } = request
    const body = await request.clone().text()
    requests.push({ at: time.now(), key: headers.get('idempotency-key'), method, body, headers })
    const line = script[Math.min(requests.length, script.length) - 1] as Answering | Response
    return line instanceof Response ? line.clone() : line(request, requests.length)
  }
  const sender = (options: IdempotentFetchOptions = {}) => idempotentFetch({ fetch, ...options })
  return { time, requests, sender, times: () => requests.map(({ at }) => at) }
}

/** Jitter that is always the same part of what it may be. */
function jitter(t: Tap, part: number): void {
  const { random } = Math
  Math.random = () => part
  t.teardown(() => {
    Math.random = random
  })
}

const created = new Response('{"id":"ch_1"}', { status: 201, headers: { 'content-type': 'application/json' } })
const networkError: Answering = () => Promise.reject(new TypeError('fetch failed'))
const silence: Answering = ({ signal }) =>
  new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason)))

function refusal(status: number, code: string, headers: Record<string, string> = {}, type = 'application/json') {
  const body = JSON.stringify({ statusCode: status, code, error: 'x', message: 'x' })
  return new Response(body, { status, headers: { 'content-type': type, ...headers } })
}

const order = { method: 'POST', body: '{"amount":1}' }

t.test('each call is an operation with a key of its own, which is a UUID', async (t) => {
  const { sender, requests, time } = server(t, created)
  const send = sender()
  const replies = [await time.run(send(URL_, order)), await time.run(send(URL_, order))]
  const keys = requests.map(({ key }) => key)
  for (const key of keys) t.match(key, UUID_V4)
  t.equal(new Set(keys).size, 2)
  t.same(
    replies.map(({ idempotency }) => idempotency),
    keys.map((key) => ({ key, attempts: 1, replayed: false }))
  )
})

t.test('without crypto.randomUUID, as on a page without HTTPS, keys are UUIDs all the same', async (t) => {
  const { randomUUID } = crypto
  Object.defineProperty(crypto, 'randomUUID', { value: undefined, configurable: true })
  t.teardown(() => Object.defineProperty(crypto, 'randomUUID', { value: randomUUID, configurable: true }))
  const { sender, requests, time } = server(t, created)
  for (let n = 0; n < 50; n++) await time.run(sender()(URL_, order))
  for (const { key } of requests) t.match(key, UUID_V4)
  t.equal(new Set(requests.map(({ key }) => key)).size, 50)
  // All places but those of the dashes and the version.
  const places = Array.from({ length: 36 }, (_, n) => n).filter((n) => ![8, 13, 14, 18, 23].includes(n))
  for (const place of places) t.ok(new Set(requests.map(({ key }) => key?.[place])).size > 1, `place ${place}`)
})

t.test('what was sent is sent again: key, method, headers and body', async (t) => {
  const { sender, requests, time } = server(t, networkError, networkError, created)
  const headers = { 'content-type': 'application/json', authorization: 'Bearer x' }
  const response = await time.run(sender()(URL_, { ...order, headers }))
  t.equal(requests.length, 3)
  t.equal(new Set(requests.map(({ key }) => key)).size, 1)
  for (const { method, body, headers } of requests) {
    t.same([method, body], ['POST', '{"amount":1}'])
    t.same([headers.get('content-type'), headers.get('authorization')], ['application/json', 'Bearer x'])
  }
  t.equal(response.idempotency.attempts, 3)
  t.same(await response.json(), { id: 'ch_1' })
})

t.test('what becomes of a body after the call changes no attempt', async (t) => {
  const bytes = new TextEncoder().encode('before')
  const form = new FormData()
  form.set('a', 'before')
  for (const [body, change] of [
    [bytes, () => bytes.fill(0x78)],
    [form, () => form.set('a', 'after')]
  ] as const) {
    const spoil: Answering = () => {
      change()
      throw new TypeError('fetch failed')
    }
    const { sender, requests, time } = server(t, spoil, created)
    await time.run(sender()(URL_, { method: 'POST', body }))
    const [first, second] = requests
    t.match(first?.body, /before/)
    t.equal(second?.body, first?.body, 'the same bytes, with the same boundary')
    t.equal(second?.headers.get('content-type'), first?.headers.get('content-type'))
  }
})

t.test('bodies of all kinds are sent twice', async (t) => {
  const bodies = { text: 'a=1', blob: new Blob(['a=1']), params: new URLSearchParams('a=1'), none: null, empty: '' }
  for (const [kind, body] of Object.entries(bodies)) {
    const { sender, requests, time } = server(t, networkError, created)
    await time.run(sender()(URL_, { method: 'POST', body }))
    const expected = body ? 'a=1' : ''
    t.same(
      requests.map(({ body }) => body),
      [expected, expected],
      kind
    )
  }
})

t.test('a stream cannot be sent twice, and is refused before anything is sent', async (t) => {
  const { sender, requests } = server(t, created)
  const streams = {
    web: new Blob(['x']).stream(),
    'async iterable': (async function* () {
      yield Buffer.from('x')
    })(),
    'web of another make': { getReader: () => {} }
  }
  for (const [kind, body] of Object.entries(streams)) {
    const sent = sender()(URL_, { method: 'POST', body: body as ReadableStream, duplex: 'half' } as RequestInit)
    await t.rejects(sent, { name: 'TypeError', message: /stream/ }, kind)
  }
  t.equal(requests.length, 0)
})

t.test(
  'a Request is as good as a URL: its body, even a stream, is read once and sent as often as need be',
  async (t) => {
    const { sender, requests, time } = server(t, networkError, created)
    const stream = new Request(URL_, {
      method: 'PUT',
      headers: { 'x-a': 'b', 'idempotency-key': 'mine' },
      body: new Blob(['streamed']).stream(),
      duplex: 'half'
    } as RequestInit)
    const response = await time.run(sender()(stream))
    for (const { method, body, headers, key } of requests) {
      t.same([method, body, headers.get('x-a'), key], ['PUT', 'streamed', 'b', 'mine'])
    }
    t.equal(requests.length, 2)
    t.equal(response.idempotency.key, 'mine')
    await t.rejects(sender()(stream), TypeError, 'like fetch, it takes a Request once')
  }
)

t.test('what a Request is set to is kept: credentials, redirects, referrer', async (t) => {
  const seen: unknown[] = []
  const look: Answering = ({ credentials, redirect, cache, referrer, referrerPolicy, keepalive }) => {
    seen.push([credentials, redirect, cache, referrer, referrerPolicy, keepalive])
    return seen.length > 1 ? created.clone() : networkError(undefined as never, 0)
  }
  const { sender, time } = server(t, look)
  const init = { credentials: 'include', redirect: 'manual', cache: 'no-store', referrer: '', keepalive: true } as const
  await time.run(sender()(new Request(URL_, { ...order, ...init, referrerPolicy: 'origin' })))
  const expected = ['include', 'manual', 'no-store', '', 'origin', true]
  t.same(seen, [expected, expected])
})

t.test("the caller's key is used: as an option of the call, or as its header, quoted or not", async (t) => {
  for (const [init, key] of [
    [{ idempotencyKey: 'mine' }, 'mine'],
    [{ headers: { 'Idempotency-Key': 'mine' } }, 'mine'],
    [{ headers: { 'Idempotency-Key': '"a \\"b\\""' } }, 'a "b"'],
    [{ headers: { 'Idempotency-Key': 'a"b"' } }, 'a"b"'],
    [{ headers: { 'Idempotency-Key': '"a"b' } }, '"a"b'],
    [{ idempotencyKey: 'mine', headers: { 'Idempotency-Key': 'other' } }, 'mine']
  ] as const) {
    const { sender, requests, time } = server(t, networkError, created)
    const response = await time.run(sender()(URL_, { ...order, ...init }))
    t.same(
      requests.map((request) => request.key),
      [key, key]
    )
    t.equal(response.idempotency.key, key)
  }
})

t.test('header, form and source of the key can be chosen', async (t) => {
  const { sender, requests, time } = server(t, created)
  const send = sender({ header: 'X-Idempotent-Key', quoted: true, generateKey: () => 'a"\\b' })
  const response = await time.run(send(URL_, order))
  t.equal(requests[0]?.headers.get('x-idempotent-key'), '"a\\"\\\\b"')
  t.equal(requests[0]?.key, null)
  t.equal(response.idempotency.key, 'a"\\b')
  await t.rejects(send(URL_, { ...order, idempotencyKey: 'é' }), { name: 'TypeError', message: /ASCII/ })
})

t.test('a malformed key, or one that could not be sent, is refused before anything is sent', async (t) => {
  const { sender, requests } = server(t, created)
  for (const idempotencyKey of ['', ' ', '\t']) {
    await t.rejects(sender()(URL_, { ...order, idempotencyKey }), { name: 'TypeError', message: /blank/ })
  }
  await t.rejects(sender()(URL_, { ...order, headers: { 'idempotency-key': '' } }), TypeError)
  await t.rejects(sender()(URL_, { ...order, idempotencyKey: 'a\nb' }), TypeError)
  for (const none of [5, null, {}]) {
    const generateKey = () => none as never
    await t.rejects(sender({ generateKey })(URL_, order), { name: 'TypeError', message: /blank/ })
  }
  await t.rejects(sender()(URL_, { ...order, mode: 'no-cors' }), { name: 'TypeError', message: /no-cors/ })
  await t.rejects(sender()('not a url', order), TypeError)
  t.equal(requests.length, 0)
})

t.test('what is worth another attempt, and what is final', async (t) => {
  const CODE = 'FST_IDEMPOTENCY_'
  const problem = 'application/problem+json; charset=utf-8'
  const replay = { 'idempotent-replayed': 'true' }
  // What error handlers make of the plugin's error.
  const bodies: Record<string, [type: string, body: string | null]> = {
    "Fastify's own form": ['application/json', JSON.stringify({ statusCode: 409, code: `${CODE}IN_PROGRESS` })],
    'problem details': [problem, JSON.stringify({ status: 409, title: 'Conflict' })],
    'a form of its own': ['application/json', JSON.stringify({ error: { type: 'idempotency_error' } })],
    'broken JSON': ['application/json', '{'],
    HTML: ['text/html', '<h1>Conflict</h1>'],
    'an empty body': ['text/plain', ''],
    'no body': ['', null]
  }
  const cases: [what: string, reply: Response, again: boolean][] = [
    ['409 in progress', refusal(409, `${CODE}IN_PROGRESS`), true],
    ['409 claim lost', refusal(409, `${CODE}CLAIM_LOST`), true],
    ['409 in progress, as problem details', refusal(409, `${CODE}IN_PROGRESS`, {}, problem), true],
    ['409 in progress, not as JSON', refusal(409, `${CODE}IN_PROGRESS`, {}, 'text/plain'), false],
    ['409 not replayable', refusal(409, `${CODE}NOT_REPLAYABLE`), false],
    ['409 abandoned', refusal(409, `${CODE}ABANDONED`), false],
    ["409 of the application's own", refusal(409, 'OUT_OF_STOCK'), false],
    ...Object.entries(bodies).map(
      ([what, [type, body]]) =>
        [
          `409 with Retry-After, ${what}`,
          new Response(body, { status: 409, headers: { ...(type && { 'content-type': type }), 'retry-after': '1' } }),
          true
        ] as [string, Response, boolean]
    ),
    ['409 that is no JSON', new Response('{', { status: 409, headers: { 'content-type': 'application/json' } }), false],
    ['409 that is null', new Response('null', { status: 409, headers: { 'content-type': 'application/json' } }), false],
    ['409 without a body', new Response(null, { status: 409 }), false],
    ['503 store unavailable', refusal(503, `${CODE}STORE_UNAVAILABLE`), true],
    ['422 key reused', refusal(422, `${CODE}KEY_REUSED`), false],
    ['422 key invalid', refusal(422, `${CODE}KEY_INVALID`, { 'retry-after': '1' }), false],
    ['400 key missing', refusal(400, `${CODE}KEY_MISSING`), false],
    ...[408, 425, 429, 500, 502, 503, 504].map(
      (status) => [String(status), new Response('x', { status }), true] as [string, Response, boolean]
    ),
    ...[200, 201, 204, 303, 400, 401, 402, 403, 404, 410, 412, 413, 422, 501, 505, 507].map(
      (status) => [String(status), new Response(null, { status }), false] as [string, Response, boolean]
    ),
    ['a replay of a 500', new Response('x', { status: 500, headers: replay }), false],
    ['a replay of a 503', refusal(503, 'MINE', { ...replay, 'retry-after': '1' }), false],
    ['a replay of a 409', refusal(409, 'MINE', { ...replay, 'retry-after': '1' }), false]
  ]
  for (const [what, reply, again] of cases) {
    const { sender, requests, time } = server(t, reply, created)
    const response = await time.run(sender()(URL_, order))
    t.same([requests.length, response.status], again ? [2, 201] : [1, reply.status], what)
    t.equal(response.bodyUsed, false, `${what}: the body is the caller's`)
    t.equal(await response.text(), again ? '{"id":"ch_1"}' : await reply.clone().text(), what)
  }
})

t.test('a replay is told from a first reply', async (t) => {
  const replay = new Response('x', { headers: { 'idempotent-replayed': 'true', 'x-replay': 'true' } })
  for (const [options, replayed] of [
    [{}, true],
    [{ replayHeader: 'X-Replay' }, true],
    [{ replayHeader: 'X-Other' }, false]
  ] as const) {
    const { sender, time } = server(t, replay)
    t.equal((await time.run(sender(options)(URL_, order))).idempotency.replayed, replayed)
  }
})

t.test('shouldRetry has the first word, reads a copy, and may leave it to the default', async (t) => {
  const IN_USE = { error: { code: 'idempotency_key_in_use' } }
  const busy = Response.json(IN_USE, { status: 409 })
  const shouldRetry = async (reply: Response) => {
    if (reply.status === 500) return (await reply.text()) !== 'boom'
    if (reply.status !== 409) return undefined
    return ((await reply.json()) as typeof IN_USE).error.code === IN_USE.error.code
  }
  const one = server(t, busy, new Response('x', { status: 503 }), created)
  const response = await one.time.run(one.sender({ shouldRetry })(URL_, order))
  t.same([response.status, await response.json(), one.requests.length], [201, { id: 'ch_1' }, 3])
  const two = server(t, new Response('boom', { status: 500 }))
  t.equal(await (await two.time.run(two.sender({ shouldRetry })(URL_, order))).text(), 'boom')
  const three = server(t, created)
  const broken = () => Promise.reject(new Error('mine'))
  await t.rejects(three.time.run(three.sender({ shouldRetry: broken })(URL_, order)), { message: 'mine' })
  t.equal(three.requests.length, 1, 'whose errors are nobody else')
})

t.test('shouldRetry is not asked about a replay, which is returned', async (t) => {
  const { sender, requests, time } = server(
    t,
    new Response('boom', { status: 500 }),
    new Response('boom', { status: 500, headers: { 'idempotent-replayed': 'true' } })
  )
  const asked: number[] = []
  const shouldRetry = ({ status }: Response) => asked.push(status) > 0
  const response = await time.run(sender({ shouldRetry })(URL_, order))
  t.same([asked, requests.length], [[500], 2])
  t.same([await response.text(), response.idempotency.replayed], ['boom', true])
})

/** A reply without end, in numbered chunks, which counts what is read of it. */
function endless(status: number, headers: Record<string, string>) {
  const count = { bytes: 0, cancelled: false }
  const body = new ReadableStream<Uint8Array>(
    {
      pull(controller) {
        controller.enqueue(new Uint8Array(1_024).fill(count.bytes / 1_024))
        count.bytes += 1_024
      },
      cancel() {
        count.cancelled = true
      }
    },
    { highWaterMark: 0 }
  )
  return { count, reply: () => new Response(body, { status, headers }) }
}

t.test('of a body that is only looked at a few KiB are read, and the rest is let go', async (t) => {
  const json = { 'content-type': 'application/json' }
  for (const [what, status, headers] of [
    ['409 with Retry-After', 409, { ...json, 'retry-after': '1' }],
    ['503', 503, json]
  ] as const) {
    const { count, reply } = endless(status, headers)
    const { sender, time } = server(t, reply, created)
    t.equal((await time.run(sender()(URL_, order))).status, 201, what)
    t.ok(count.bytes < 32 * 1_024, `${count.bytes} bytes of a ${what}`)
    t.equal(count.cancelled, true, what)
  }
})

t.test('to find out a code no megabyte is read, and what was read is not lost to the caller', async (t) => {
  const { count, reply } = endless(409, { 'content-type': 'application/json' })
  const { sender, requests, time } = server(t, reply, created)
  const response = await time.run(sender({ streamReplies: true })(URL_, order))
  t.same([response.status, requests.length], [409, 1])
  t.ok(count.bytes < 32 * 1_024, `${count.bytes} bytes`)
  const reader = (response.body as ReadableStream<Uint8Array>).getReader()
  for (let chunk = 0; chunk < 40; chunk++) t.equal((await reader.read()).value?.[0], chunk)
  await reader.cancel()
  t.equal(count.cancelled, true)
})

t.test('a copy that shouldRetry leaves unread does not hold up what the caller reads', async (t) => {
  const { count, reply } = endless(200, { 'content-type': 'text/event-stream' })
  const { sender, time } = server(t, reply)
  const response = await time.run(sender({ shouldRetry: () => false })(URL_, order))
  await (response.body as ReadableStream<Uint8Array>).cancel()
  t.equal(count.cancelled, true, 'nobody else has a hold on it')
})

t.test('pauses double up to a limit, with jitter between half and whole', async (t) => {
  for (const [part, expected] of [
    [0, [0, 50, 150, 350, 700, 1050]],
    [1, [0, 100, 300, 700, 1400, 2100]]
  ] as const) {
    jitter(t, part)
    const { sender, time, times } = server(t, networkError)
    const send = sender({ minDelay: 100, maxDelay: 700, maxAttempts: 6 })
    await t.rejects(time.run(send(URL_, order)), IdempotentFetchError)
    t.same(times(), expected)
  }
})

t.test('Retry-After is honoured, in seconds or as a date, with jitter behind it', async (t) => {
  jitter(t, 1)
  const inFiveSeconds = new Date(Date.UTC(2030, 0, 1) + 5_000).toUTCString()
  const replies = {
    seconds: refusal(409, 'FST_IDEMPOTENCY_IN_PROGRESS', { 'retry-after': '5' }),
    date: refusal(503, 'x', { 'retry-after': inFiveSeconds }),
    'seconds of a 429': refusal(429, 'x', { 'retry-after': '5' })
  }
  for (const [what, reply] of Object.entries(replies)) {
    const { sender, time, times } = server(t, reply, created)
    await time.run(sender({ minDelay: 100 })(URL_, order))
    t.same(times(), [0, 5_050], what)
  }
  for (const useless of ['0', '-1', '1.5', 'soon', '', new Date(0).toUTCString()]) {
    const { sender, time, times } = server(t, refusal(503, 'x', { 'retry-after': useless }), created)
    await time.run(sender({ minDelay: 100 })(URL_, order))
    t.same(times(), [0, 100], `"${useless}" is as good as none`)
  }
})

t.test('after the last attempt there is what there is: the last reply, or an error with the key', async (t) => {
  const one = server(t, networkError, refusal(503, 'x'))
  const response = await one.time.run(one.sender({ maxAttempts: 3 })(URL_, order))
  t.same([response.status, response.idempotency.attempts, one.requests.length], [503, 3, 3])
  t.match(await response.json(), { code: 'x' })
  const two = server(t, refusal(503, 'x'), networkError)
  const error = await two.time.run(
    two
      .sender({ maxAttempts: 2 })(URL_, order)
      .catch((error) => error)
  )
  t.ok(error instanceof IdempotentFetchError)
  t.match(error, { name: 'IdempotentFetchError', key: two.requests[0]?.key, attempts: 2 })
  t.match((error as Error).cause, { message: 'fetch failed' })
  t.equal((error as Error).message, 'No reply after 2 attempts: whether the request was carried out is not known')
  const three = server(t, networkError)
  const once = three.time.run(three.sender({ maxAttempts: 1 })(URL_, order))
  await t.rejects(once, { message: 'No reply after 1 attempt: whether the request was carried out is not known' })
})

t.test('an attempt without an answer is given up, and the next one made', async (t) => {
  jitter(t, 0)
  const { sender, time, times, requests } = server(t, silence, silence, created)
  const response = await time.run(sender({ attemptTimeout: 1_000, minDelay: 100 })(URL_, order))
  t.same([response.status, times()], [201, [0, 1_050, 2_150]])
  t.equal(new Set(requests.map(({ key }) => key)).size, 1)
})

t.test('the timeout ends everything: an attempt, or a pause that would be too long', async (t) => {
  const one = server(t, silence)
  const error = await one.time.run(
    one
      .sender({ timeout: 1_000, attemptTimeout: null })(URL_, order)
      .catch((error) => error)
  )
  t.match(error, { name: 'IdempotentFetchError', attempts: 1, cause: { name: 'TimeoutError' } })
  t.equal(one.time.now(), 1_000)
  const late = server(t, networkError, silence)
  await late.time.run(
    late
      .sender({ timeout: 1_000, minDelay: 100 })(URL_, order)
      .catch(() => {})
  )
  t.equal(late.time.now(), 1_000, 'a later attempt has what is left')
  const patient = server(t, () =>
    patient.time.run(new Promise((resolve) => setTimeout(() => resolve(created), 60_000)))
  )
  const send = patient.sender({ timeout: null, attemptTimeout: null })
  t.equal((await patient.time.run(send(URL_, order))).idempotency.attempts, 1, 'without any there is none')
  const two = server(t, refusal(503, 'x', { 'retry-after': '3600' }))
  const response = await two.time.run(two.sender({ timeout: 60_000 })(URL_, order))
  t.same([response.status, two.time.now()], [503, 0], 'at once, because waiting is in vain')
  const three = server(t, refusal(503, 'x', { 'retry-after': '10000000' }), created)
  t.equal((await three.time.run(three.sender({ timeout: null })(URL_, order))).status, 201)
  t.ok(three.time.now() > 2 ** 31 - 2, 'a pause is not cut short because timers are')
})

t.test('the signal aborts an attempt and a pause, with its reason, and nothing more is sent', async (t) => {
  jitter(t, 0)
  for (const at of [500, 1_050]) {
    const { sender, time, requests } = server(t, silence)
    const controller = new AbortController()
    time.at(at, () => controller.abort(new Error('enough')))
    const sent = sender({ attemptTimeout: 1_000, minDelay: 200 })(URL_, { ...order, signal: controller.signal })
    await t.rejects(time.run(sent), { message: 'enough' })
    t.same([time.now(), requests.length], [at, 1])
    t.equal(time.pending(), 0, 'no timer is left')
    t.equal(getEventListeners(controller.signal, 'abort').length, 0, 'no listener is left')
  }
})

t.test('a signal that aborts the last attempt is the reason for its end, not the number of attempts', async (t) => {
  const { sender, time } = server(t, silence)
  const controller = new AbortController()
  time.at(500, () => controller.abort(new Error('enough')))
  const sent = sender({ maxAttempts: 1 })(URL_, { ...order, signal: controller.signal })
  await t.rejects(time.run(sent), { message: 'enough' })
})

t.test('a signal that has aborted already, or that came with a Request, counts as well', async (t) => {
  const { sender, time, requests } = server(t, silence)
  await t.rejects(sender()(URL_, { ...order, signal: AbortSignal.abort() }), { name: 'AbortError' })
  t.equal(requests.length, 0)
  const controller = new AbortController()
  time.at(10, () => controller.abort())
  await t.rejects(time.run(sender()(new Request(URL_, { ...order, signal: controller.signal }))), {
    name: 'AbortError'
  })
  t.equal(requests.length, 1)
})

t.test('a signal that aborts in the moment of a reply stops the pause', async (t) => {
  const controller = new AbortController()
  const { sender, time, requests } = server(t, refusal(503, 'x'))
  const shouldRetry = () => {
    controller.abort()
    return true
  }
  await t.rejects(time.run(sender({ shouldRetry })(URL_, { ...order, signal: controller.signal })), {
    name: 'AbortError'
  })
  t.same([time.now(), requests.length], [0, 1])
})

t.test('nothing is left behind by a call that went well', async (t) => {
  const { sender, time } = server(t, networkError, refusal(503, 'x'), created)
  const { signal } = new AbortController()
  await time.run(sender()(URL_, { ...order, signal }))
  t.same([time.pending(), getEventListeners(signal, 'abort').length], [0, 0])
})

/** A body in two parts, of which the second one comes, fails, or never comes. */
function inParts(signal: AbortSignal, end: 'whole' | 'broken' | 'endless', type = 'text/plain'): Response {
  const body = new ReadableStream({
    start(controller) {
      signal.addEventListener('abort', () => controller.error(signal.reason))
      controller.enqueue(new TextEncoder().encode('one '))
    },
    async pull(controller) {
      if (end === 'endless') return
      await new Promise((resolve) => setImmediate(resolve))
      if (end === 'broken') return controller.error(new TypeError('terminated'))
      controller.enqueue(new TextEncoder().encode('two'))
      controller.close()
    }
  })
  return new Response(body, { headers: { 'content-type': type } })
}

t.test('a reply that breaks off, or stops, is asked for again', async (t) => {
  for (const end of ['broken', 'endless'] as const) {
    const { sender, time, requests } = server(
      t,
      ({ signal }) => inParts(signal, end),
      ({ signal }) => inParts(signal, 'whole')
    )
    const response = await time.run(sender()(URL_, order))
    t.same([await response.text(), requests.length], ['one two', 2], end)
  }
})

t.test(
  'event streams, and with streamReplies all replies, are passed on as they come, and can be aborted',
  async (t) => {
    for (const [options, type] of [
      [{}, 'text/event-stream; charset=utf-8'],
      [{ streamReplies: true }, 'text/plain']
    ] as const) {
      const { sender, time } = server(t, refusal(503, 'x'), ({ signal }) => inParts(signal, 'endless', type))
      const controller = new AbortController()
      const response = await time.run(sender(options)(URL_, { ...order, signal: controller.signal }))
      const reader = (response.body as ReadableStream<Uint8Array>).getReader()
      t.equal(new TextDecoder().decode((await reader.read()).value), 'one ')
      t.equal(getEventListeners(controller.signal, 'abort').length, 1, 'the last attempt alone listens')
      t.equal(time.pending(), 0, 'what is being read has no timeout')
      const next = reader.read()
      controller.abort(new Error('enough'))
      await t.rejects(next, { message: 'enough' })
    }
  }
)

t.test('a reply whose type only contains that of an event stream is waited for', async (t) => {
  for (const type of ['x-text/event-stream', 'text/event-streams']) {
    const { sender, time } = server(t, new Response('x', { headers: { 'content-type': type } }))
    const controller = new AbortController()
    await time.run(sender()(URL_, { ...order, signal: controller.signal }))
    t.equal(getEventListeners(controller.signal, 'abort').length, 0)
  }
})

t.test('a reply may have no body, also one to be repeated, or one that is passed on as it comes', async (t) => {
  for (const streamReplies of [false, true]) {
    const empty = (status: number) => new Response(null, { status })
    const { sender, requests, time } = server(t, empty(503), empty(204))
    t.equal((await time.run(sender({ streamReplies })(URL_, order))).status, 204)
    t.equal(requests.length, 2)
  }
})

t.test('with streamReplies nothing is waited for of a reply that is to be repeated', async (t) => {
  for (const reply of [refusal(503, 'x'), refusal(409, 'x', { 'retry-after': '0' })]) {
    const { status, headers } = reply
    const { sender, time } = server(t, () => new Response(new ReadableStream(), { status, headers }), created)
    t.equal((await time.run(sender({ streamReplies: true })(URL_, order))).status, 201)
    t.ok(time.now() < 30_000, `${status}`)
  }
})

t.test('with streamReplies a 409 that breaks off is asked for again, and nothing of it is left behind', async (t) => {
  const broken: Answering = ({ signal }) => {
    const { body, headers } = inParts(signal, 'broken', 'application/json')
    return new Response(body, { status: 409, headers })
  }
  const { sender, time } = server(t, broken, created)
  const { signal } = new AbortController()
  t.equal((await time.run(sender({ streamReplies: true })(URL_, { ...order, signal }))).status, 201)
  t.equal(getEventListeners(signal, 'abort').length, 1, 'the last attempt alone listens')
})

t.test('with streamReplies a 409 is understood all the same', async (t) => {
  const { sender, time } = server(t, refusal(409, 'FST_IDEMPOTENCY_IN_PROGRESS'), created)
  t.equal((await time.run(sender({ streamReplies: true })(URL_, order))).status, 201)
})

t.test('options that are unknown or invalid are refused, by name', async (t) => {
  for (const [options, message] of [
    [{ retries: 3 }, /"retries" is not known/],
    [{ constructor: 3 }, /"constructor" is not known/],
    [{ header: '' }, /"header" takes a header name, got {2}\(string\)/],
    [{ replayHeader: false }, /"replayHeader" takes a header name, got false/],
    [{ quoted: 'yes' }, /"quoted" takes true or false, got yes \(string\)/],
    [{ maxAttempts: 0 }, /"maxAttempts" takes a positive integer, got 0 \(number\)/],
    [{ timeout: -1 }, /"timeout" takes a positive integer of milliseconds, or null, got/],
    [
      { attemptTimeout: Number.POSITIVE_INFINITY },
      /"attemptTimeout" takes a positive integer of milliseconds, or null, got/
    ],
    [{ minDelay: 1.5 }, /"minDelay" takes a positive integer of milliseconds, got/],
    [{ maxDelay: null }, /"maxDelay" takes a positive integer of milliseconds, got/],
    [{ generateKey: 'k' }, /"generateKey" takes a function/],
    [{ shouldRetry: true }, /"shouldRetry" takes a function/],
    [{ streamReplies: 1 }, /"streamReplies" takes true or false, got/],
    [{ fetch: {} }, /"fetch" takes a function/]
  ] as const) {
    t.throws(() => idempotentFetch(options as never), { name: 'TypeError', message })
  }
  t.doesNotThrow(() => idempotentFetch({ header: undefined, timeout: null, attemptTimeout: null } as never))
})

t.test('without the option, fetch is looked up when it is called', async (t) => {
  const { fetch } = globalThis
  t.teardown(() => {
    globalThis.fetch = fetch
  })
  const send = idempotentFetch()
  globalThis.fetch = async () => Response.json({ mine: true })
  t.same(await (await send(URL_, order)).json(), { mine: true })
})
