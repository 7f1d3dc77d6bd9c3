import { createHash } from 'node:crypto'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Profile } from '../../lib/conform.js'

/*
 * A small payments API on node:http that keeps every rule of the conformance suite, but for the one that it is told to
 * break. It is here to try the suite: nothing of the plugin is in it.
 */

/** What is different in a server that breaks a rule, by the id of the rule. */
export const FAULTS: Readonly<Record<string, string>> = {
  'sequential-once': 'a stored reply is forgotten when it was replayed once',
  'concurrent-once': 'the third of the duplicates in flight is carried out, and says the same',
  'concurrent-same-reply': 'the third of the duplicates in flight gets an empty 202',
  'client-gone-once': 'a client that hangs up takes the note of its key with it',
  'retry-on-heels': 'the reply is stored a little after it was sent',
  'same-status': 'replays are 200',
  'same-body': 'replays have a line feed more',
  'same-headers': 'replays have no Location',
  'replay-marked': 'replays have no mark',
  'binary-reply': 'bodies are stored as UTF-8',
  'streamed-reply': 'what was streamed is replayed empty',
  'large-reply': 'what is stored ends after 64 KiB',
  'failure-not-stuck': 'a failure leaves its key running',
  'failure-consistent': 'the first retry of a failure gets its reply, later ones run',
  'other-payload-not-executed': 'another payload is carried out, and then refused',
  'other-payload-no-reply': 'payloads are not compared once there is a reply',
  'other-payload-while-running': 'payloads are not compared while the first request runs',
  'mismatch-keeps-reply': 'the refusal of another payload is stored',
  'other-payload-422': 'another payload is refused with 400',
  'by-value': 'payloads are compared as they were sent',
  'other-target-no-reply': 'a key counts for all URLs',
  'other-query-no-reply': 'a key counts for all queries',
  'other-caller-no-reply': 'a key counts for all callers',
  'credentials-before-replay': 'replies are replayed before it is asked who wants them',
  'refused-caller-keeps-reply': 'a refused request takes the reply of its key with it',
  'different-keys': 'keys are compared without letter case',
  'empty-key-not-executed': 'an empty key is taken for none, and none is needed then',
  'malformed-key-refused': 'two keys in one request are taken for one',
  'missing-key-not-executed': 'without a key, the request is carried out and then refused',
  'missing-key-400': 'a missing key is refused with 428',
  'structured-key': 'quotes are refused',
  'in-progress-409': 'a duplicate is refused with 423 while the first request runs',
  'retry-after': 'there is no Retry-After',
  'other-key-while-running': 'one request at a time, whatever the key',
  'conflict-keeps-reply': 'a reply is not stored when one or two duplicates were refused meanwhile',
  waiting: 'a duplicate waits, and gets a 504',
  'problem-details': 'refusals are plain text',
  expiry: 'keys never expire',
  'expiry-published': 'the document does not say how long keys are kept'
}

/** What is said of it: everything that can be said. */
export const PROFILE: Profile = {
  path: '/charges',
  body: { amount: 4200, currency: 'EUR' },
  key: { required: true },
  callers: [{ authorization: 'Bearer alice' }, { authorization: 'Bearer bob' }],
  count: { url: '/executions', pointer: '/count' },
  slow: { body: { processingMs: 500 } },
  fail: { body: { fail: true } },
  otherPath: '/refunds',
  binary: { path: '/receipts' },
  stream: { path: '/exports' },
  large: { path: '/reports' },
  expiring: { path: '/expiring' },
  // Long enough for a retry on a busy machine.
  expiryMs: 1_000,
  replayHeader: 'Idempotent-Replayed',
  documentation: '/docs',
  concurrency: 5
}

interface Stored {
  status: number
  headers: Record<string, string>
  body: Buffer
}

interface Entry {
  payload: string
  query: string
  running: boolean
  reply: Stored | null
  replays: number
  /** Duplicates that are in flight. */
  duplicates: number
  /** Duplicates that were refused. */
  conflicts: number
  ended: Promise<void>
  end: () => void
}

/** @param fault The rule that is broken; `null` for none. */
export async function startEndpoint(fault: string | null): Promise<{ url: string; close: () => Promise<void> }> {
  const endpoint = new Endpoint(fault)
  const server: Server = createServer((request, response) => {
    endpoint.answer(request, response).catch((error) => {
      response.destroy(error)
    })
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      })
  }
}

class Refused {
  constructor(
    readonly status: number,
    readonly title: string,
    readonly headers: Record<string, string> = {}
  ) {}
}

class Endpoint {
  readonly #fault: string | null
  readonly #entries = new Map<string, Entry>()
  #executions = 0

  constructor(fault: string | null) {
    this.#fault = fault
  }

  #has(fault: string): boolean {
    return this.#fault === fault
  }

  async answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk)
    const url = new URL(request.url as string, 'http://localhost')
    if (url.pathname === '/executions') return void response.end(JSON.stringify({ count: this.#executions }))
    if (url.pathname === '/docs') {
      return void response.end(`Idempotency-Key: ${this.#has('expiry-published') ? 'as usual' : 'expires after a day'}`)
    }
    try {
      const { status, headers, body } = await this.#reply(request, response, url, Buffer.concat(chunks).toString())
      response.writeHead(status, headers).end(body)
    } catch (refused) {
      if (!(refused instanceof Refused)) throw refused
      const { status, title, headers } = refused
      const [type, body] = this.#has('problem-details')
        ? ['text/plain', title]
        : ['application/problem+json', JSON.stringify({ type: 'about:blank', title, status })]
      response.writeHead(status, { 'content-type': type, ...headers }).end(body)
    }
  }

  async #reply(request: IncomingMessage, response: ServerResponse, url: URL, text: string): Promise<Stored> {
    const caller = /^Bearer (alice|bob)$/.exec(request.headers.authorization ?? '')?.[1]
    const isKnownFirst = this.#has('credentials-before-replay')
    if (caller === undefined && !isKnownFirst) {
      if (this.#has('refused-caller-keeps-reply')) {
        this.#entries.delete([url.pathname, 'alice', request.headers['idempotency-key']].join('\n'))
      }
      throw new Refused(401, 'Who are you?')
    }
    const body = JSON.parse(text) as Record<string, unknown>
    const key = await this.#key(request, url, body)
    if (key === null) return this.#run(url, body)
    const place = [
      this.#has('other-target-no-reply') ? '' : url.pathname,
      this.#has('other-caller-no-reply') ? '' : (caller ?? 'alice'),
      key
    ].join('\n')
    const payload = this.#has('by-value') ? text : JSON.stringify(Object.entries(body).sort())
    const known = this.#entries.get(place)
    if (known !== undefined) return this.#duplicate(place, known, { payload, url, body })
    if (caller === undefined) throw new Refused(401, 'Who are you?')
    const isBusy = [...this.#entries.values()].some(({ running }) => running)
    if (isBusy && this.#has('other-key-while-running')) throw new Refused(409, 'One at a time')
    return this.#first(place, { payload, url, body, response })
  }

  async #key(request: IncomingMessage, url: URL, body: Record<string, unknown>): Promise<string | null> {
    const lines = request.headersDistinct['idempotency-key'] ?? []
    if (lines.length === 0) {
      if (this.#has('missing-key-not-executed')) await this.#run(url, body)
      throw new Refused(this.#has('missing-key-400') ? 428 : 400, 'A key is needed')
    }
    if (lines.length > 1 && !this.#has('malformed-key-refused')) throw new Refused(400, 'One key is enough')
    const line = lines.join(', ')
    if (line === '') {
      if (this.#has('empty-key-not-executed')) return null
      throw new Refused(400, 'The key is empty')
    }
    if (line.startsWith('"') && this.#has('structured-key')) throw new Refused(400, 'No quotes, please')
    const key = line.replaceAll('"', '')
    return this.#has('different-keys') ? key.toLowerCase() : key
  }

  async #duplicate(
    place: string,
    entry: Entry,
    { payload, url, body }: { payload: string; url: URL; body: Record<string, unknown> }
  ): Promise<Stored> {
    const isOtherQuery = url.search !== entry.query && !this.#has('other-query-no-reply')
    const isOther = isOtherQuery || payload !== entry.payload
    if (entry.running) {
      if (isOther && !this.#has('other-payload-while-running')) this.#mismatch()
      if (isOther) {
        await entry.ended
        return entry.reply as Stored
      }
      entry.duplicates++
      try {
        return await this.#conflict(entry)
      } finally {
        entry.duplicates--
      }
    }
    if (isOtherQuery || (isOther && !this.#has('other-payload-no-reply'))) {
      if (this.#has('other-payload-not-executed')) await this.#run(url, body)
      if (this.#has('mismatch-keeps-reply')) {
        entry.payload = payload
        entry.reply = { status: 422, headers: {}, body: Buffer.from('{"title":"Another payload"}') }
      }
      this.#mismatch()
    }
    const isFailure = (entry.reply?.status ?? 0) >= 500
    if (this.#has('sequential-once') && entry.replays > 0 && !isFailure) this.#entries.delete(place)
    if (isFailure && this.#has('failure-consistent') && entry.replays > 0) await this.#run(url, body)
    entry.replays++
    return this.#replayed(entry.reply as Stored)
  }

  #mismatch(): never {
    throw new Refused(this.#has('other-payload-422') ? 400 : 422, 'The key was used with another payload')
  }

  async #conflict(entry: Entry): Promise<Stored> {
    // They have all arrived by then.
    if (this.#has('concurrent-once') || this.#has('concurrent-same-reply')) await sleep(150)
    if (entry.duplicates > 1 && this.#has('concurrent-same-reply')) {
      return { status: 202, headers: {}, body: Buffer.from('{"id":"unknown"}') }
    }
    if (entry.duplicates > 1 && this.#has('concurrent-once')) {
      this.#executions++
      await entry.ended
      return entry.reply as Stored
    }
    entry.conflicts++
    if (this.#has('waiting')) {
      await entry.ended
      return { status: 504, headers: {}, body: Buffer.alloc(0) }
    }
    const headers: Record<string, string> = this.#has('retry-after') ? {} : { 'retry-after': '1' }
    throw new Refused(this.#has('in-progress-409') ? 423 : 409, 'It is in progress', headers)
  }

  async #first(
    place: string,
    {
      payload,
      url,
      body,
      response
    }: { payload: string; url: URL; body: Record<string, unknown>; response: ServerResponse }
  ): Promise<Stored> {
    let end!: () => void
    const ended = new Promise<void>((resolve) => {
      end = resolve
    })
    const entry: Entry = {
      payload,
      query: url.search,
      running: true,
      reply: null,
      replays: 0,
      duplicates: 0,
      conflicts: 0,
      ended,
      end
    }
    this.#entries.set(place, entry)
    if (this.#has('client-gone-once')) response.on('close', () => entry.running && this.#entries.delete(place))
    const reply = await this.#run(url, body)
    const store = () => {
      entry.reply = this.#kept(reply, url)
      entry.running = reply.status >= 500 && this.#has('failure-not-stuck')
      entry.end()
      const isCalm = entry.conflicts > 0 && entry.conflicts < 3 && !response.destroyed
      if (isCalm && this.#has('conflict-keeps-reply')) this.#entries.delete(place)
      if (url.pathname === '/expiring' && !this.#has('expiry'))
        setTimeout(() => this.#entries.delete(place), PROFILE.expiryMs as number).unref()
    }
    if (this.#has('retry-on-heels')) setTimeout(store, 100)
    else store()
    return reply
  }

  #kept(reply: Stored, url: URL): Stored {
    if (url.pathname === '/receipts' && this.#has('binary-reply'))
      return { ...reply, body: Buffer.from(`${reply.body}`) }
    if (url.pathname === '/exports' && this.#has('streamed-reply')) return { ...reply, body: Buffer.alloc(0) }
    return this.#has('large-reply') ? { ...reply, body: reply.body.subarray(0, 65_536) } : reply
  }

  #replayed({ status, headers, body }: Stored): Stored {
    const { location, ...others } = headers
    return {
      status: this.#has('same-status') && status < 500 ? 200 : status,
      headers: {
        ...(this.#has('same-headers') || location === undefined ? others : headers),
        ...(this.#has('replay-marked') ? {} : { 'idempotent-replayed': 'true' })
      },
      body: this.#has('same-body') && status < 500 && body.length < 200 ? Buffer.from(`${body}\n`) : body
    }
  }

  /** The handler. */
  async #run(url: URL, { amount, currency, processingMs = 0, fail }: Record<string, unknown>): Promise<Stored> {
    const number = ++this.#executions
    await sleep(Number(processingMs))
    const id = createHash('sha256').update(String(number)).digest('hex').slice(0, 12)
    const type = { 'content-type': 'application/json' }
    if (fail) return { status: 500, headers: type, body: Buffer.from('{"title":"It failed"}') }
    const headers = { ...type, location: `${url.pathname}/${id}` }
    if (url.pathname === '/receipts') {
      const bytes = Buffer.from([...Array(256).keys(), number % 256])
      return { status: 201, headers: { ...headers, 'content-type': 'application/octet-stream' }, body: bytes }
    }
    const size = { '/reports': 300_000, '/exports': 300 }[url.pathname] ?? 0
    const rows = size > 0 ? 'x'.repeat(size) : undefined
    return { status: 201, headers, body: Buffer.from(JSON.stringify({ id, amount, currency, rows })) }
  }
}
