import { connect, createServer, type Server, type Socket } from 'node:net'
import { join } from 'node:path'
import { makeFolder } from './process.js'

/**
 * What becomes of a statement and its answer.
 *
 *   unsent          the connection is cut before the statement has left
 *   unheard         the server has done it; the connection is cut before the answer arrives
 *   cut             the connection is cut once the statement has left: nobody knows what becomes of it
 *   silent unsent   the statement gets lost, and nothing is said any more, on a connection that looks alive
 *   silent unheard  the same, but the server has done it
 */
export const LOSSES = ['unsent', 'unheard', 'cut', 'silent unsent', 'silent unheard'] as const
export type Loss = (typeof LOSSES)[number]

export interface ProxyOptions {
  /**
   * After so many milliseconds of silence a client's connection ends. The server is told when ten times that has passed,
   * as its own keepalives would: else those that it waits for would be more than it can have.
   */
  silence?: number
}

/** A bad network between pools and a PostgreSQL server. It knows where a statement and its answer end. */
export class PostgresProxy {
  /** The folder of the unix socket, for pools: `server.pool({ host })`. */
  readonly host = makeFolder('proxy')
  /** Asked about every statement, parameters and all. */
  loss: (statement: string) => Loss | null = () => null
  readonly #target: string
  readonly #silence: number
  readonly #links = new Set<Link>()
  readonly #server: Server

  static async start(server: { host: string }, { silence = 800 }: ProxyOptions = {}): Promise<PostgresProxy> {
    const proxy = new PostgresProxy(server.host, silence)
    await new Promise<void>((resolve) => proxy.#server.listen(socketIn(proxy.host), resolve))
    return proxy
  }

  private constructor(target: string, silence: number) {
    this.#target = socketIn(target)
    this.#silence = silence
    this.#server = createServer((client) => {
      const link: Link = new Link(client, connect(this.#target), this.#silence, (text) => this.loss(text))
      this.#links.add(link)
      link.over.then(() => this.#links.delete(link))
    })
  }

  /** Cuts every connection. */
  cut(): void {
    for (const link of this.#links) link.cut()
  }

  async close(): Promise<void> {
    const closed = new Promise((resolve) => this.#server.close(resolve))
    this.cut()
    await closed
  }
}

const socketIn = (folder: string) => join(folder, '.s.PGSQL.5432')

/** One connection. */
class Link {
  readonly over: Promise<unknown>
  readonly #client: Socket
  readonly #server: Socket
  /** `passing`: as if there was no proxy; `last answer`: which is not passed on; `silent`: nothing is. */
  #state: 'passing' | 'last answer' | 'silent' = 'passing'

  constructor(client: Socket, server: Socket, silence: number, lossOf: (statement: string) => Loss | null) {
    this.#client = client
    this.#server = server
    const closed = (socket: Socket) => new Promise((resolve) => socket.once('close', resolve))
    this.over = Promise.all([closed(client), closed(server)])
    for (const [socket, other] of [
      [client, server],
      [server, client]
    ] as const) {
      socket.on('error', () => {})
      // Of a connection that has fallen silent, neither side learns what has become of the other.
      socket.on('close', () => this.#state === 'silent' || other.destroy())
    }
    const beSilent = () => {
      this.#state = 'silent'
      setTimeout(() => client.destroy(), silence).unref()
      setTimeout(() => server.destroy(), 10 * silence).unref()
    }
    const asked = new Messages(false)
    let statement: Buffer[] = []
    client.on('data', (chunk) => {
      for (const message of asked.read(chunk)) {
        if (this.#state !== 'passing') return
        statement.push(message)
        if (!ENDS_STATEMENT.has(asked.typeOf(message))) continue
        const bytes = Buffer.concat(statement)
        statement = []
        const loss = lossOf(bytes.toString('latin1'))
        if (loss === 'unsent') return this.cut()
        if (loss === 'silent unsent') return beSilent()
        server.write(bytes)
        if (loss === 'cut') return this.cut()
        if (loss === 'unheard') this.#state = 'last answer'
        if (loss === 'silent unheard') beSilent()
      }
    })
    const answered = new Messages(true)
    server.on('data', (chunk) => {
      if (this.#state === 'passing') client.write(chunk)
      for (const message of answered.read(chunk)) {
        if (this.#state === 'last answer' && answered.typeOf(message) === READY) return this.cut()
      }
    })
  }

  cut(): void {
    this.#state = 'passing'
    this.#client.destroy()
    // What was written last still goes out.
    this.#server.destroySoon()
  }
}

/** https://www.postgresql.org/docs/current/protocol-message-formats.html: Query, Sync, Flush, Terminate; the first has no type. */
const ENDS_STATEMENT = new Set(['Q', 'S', 'H', 'X', ''])
const READY = 'Z'

/** The messages in a stream of bytes. */
class Messages {
  #rest: Buffer = Buffer.alloc(0)
  /** The first message of a client has no type. */
  #typed: boolean
  #first: Buffer | null = null

  constructor(typed: boolean) {
    this.#typed = typed
  }

  *read(chunk: Buffer): Generator<Buffer> {
    this.#rest = Buffer.concat([this.#rest, chunk])
    for (;;) {
      const at = this.#typed ? 1 : 0
      if (this.#rest.length < at + 4) return
      const end = at + this.#rest.readUInt32BE(at)
      if (this.#rest.length < end) return
      const message = this.#rest.subarray(0, end)
      this.#rest = this.#rest.subarray(end)
      if (!this.#typed) this.#first = message
      this.#typed = true
      yield message
    }
  }

  typeOf(message: Buffer): string {
    return message === this.#first ? '' : String.fromCharCode(message[0] as number)
  }
}
