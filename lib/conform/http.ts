import { Agent as HttpAgent, request as httpRequest, type IncomingMessage } from 'node:http'
import { Agent as HttpsAgent, request as httpsRequest } from 'node:https'

/* Requests as they are meant, line by line, and what came of them: no redirects, no decoding, no retries. */

export interface Request {
  readonly method: string
  readonly url: URL
  /** A name that comes twice is sent twice. */
  readonly headers: readonly (readonly [name: string, value: string])[]
  readonly body: string
}

export interface Reply {
  readonly status: number
  /** Names in lower case. */
  readonly headers: readonly (readonly [name: string, value: string])[]
  readonly body: Buffer
}

/** A request, and its reply or why there is none. */
export interface Exchange {
  readonly request: Request
  readonly reply: Reply | null
  /** Why there is no reply; `null` where there is one. */
  readonly failure: string | null
}

export interface SendOptions {
  /** A reply that is not complete after this many milliseconds does not count. */
  readonly timeout: number
  /** Hangs up. */
  readonly signal?: AbortSignal | undefined
  /** On one connection after another, in place of a connection for each request. */
  readonly connection?: Connection | undefined
}

/** More than this of a reply is not read. */
const MAX_REPLY_BYTES = 64 * 1024 * 1024

/** A connection that is kept. */
export class Connection {
  readonly agent: HttpAgent | HttpsAgent

  constructor(url: URL) {
    const options = { keepAlive: true, maxSockets: 1 }
    this.agent = url.protocol === 'https:' ? new HttpsAgent(options) : new HttpAgent(options)
  }

  close(): void {
    this.agent.destroy()
  }
}

/** Sends a request. Never rejects. */
export function send(request: Request, { timeout, signal, connection }: SendOptions): Promise<Exchange> {
  return new Promise((resolve) => {
    const ended = (reply: Reply | null, failure: string | null) => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', hangUp)
      resolve({ request, reply, failure })
    }
    const start = request.url.protocol === 'https:' ? httpsRequest : httpRequest
    const length = Buffer.byteLength(request.body)
    const sent = start(request.url, {
      method: request.method,
      headers: headerLines([...request.headers, ['content-length', String(length)]]),
      agent: connection?.agent ?? false
    })
    const give = (failure: string) => {
      ended(null, failure)
      sent.destroy()
    }
    const hangUp = () => give('the client hung up')
    const timer = setTimeout(() => give(`no reply within ${timeout} ms`), timeout)
    signal?.addEventListener('abort', hangUp)
    sent.on('error', (error: NodeJS.ErrnoException) => ended(null, error.code ?? error.message))
    sent.on('response', (response) => {
      read(response).then(
        (reply) => ended(reply, null),
        (error: Error) => give(`the reply broke off: ${error.message}`)
      )
    })
    sent.end(request.body)
  })
}

async function read(response: IncomingMessage): Promise<Reply> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of response) {
    length += chunk.length
    if (length > MAX_REPLY_BYTES) throw new Error(`more than ${MAX_REPLY_BYTES} bytes`)
    chunks.push(chunk)
  }
  const headers: [string, string][] = []
  for (let n = 0; n < response.rawHeaders.length; n += 2) {
    headers.push([(response.rawHeaders[n] as string).toLowerCase(), response.rawHeaders[n + 1] as string])
  }
  return { status: response.statusCode as number, headers, body: Buffer.concat(chunks) }
}

function headerLines(headers: Request['headers']): Record<string, string[]> {
  const lines: Record<string, string[]> = {}
  for (const [name, value] of headers) {
    const lower = name.toLowerCase()
    lines[lower] ??= []
    lines[lower].push(value)
  }
  return lines
}

/** The value of a reply's header; `undefined` for none. */
export function header(reply: Reply | null, name: string): string | undefined {
  return reply?.headers.find(([known]) => known === name.toLowerCase())?.[1]
}

/** The body where it is JSON; `undefined` where it is not. */
export function json(reply: Reply | null): unknown {
  try {
    return JSON.parse(String(reply?.body))
  } catch {
    return undefined
  }
}

/** The request as a command line that sends it again. */
export function curl({ method, url, headers, body }: Request): string {
  const parts = ['curl', '-i', '-X', method, quoted(url.href)]
  for (const [name, value] of headers) parts.push('-H', quoted(value === '' ? `${name};` : `${name}: ${value}`))
  if (body !== '') parts.push('--data-binary', quoted(body))
  return parts.join(' ')
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`
}
