import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { rm } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { Redis, type RedisOptions } from 'ioredis'
import { createClient } from 'redis'
import { latch, until } from './latch.js'
import { freePort, launch, makeFolder, type ServerProcess } from './process.js'

// The compiled file is in .build/test/support. The address is computed so that the compiler does not follow it.
const services: { findRedis(): { server: string; env: Record<string, string> } | null } = await import(
  new URL('../../../scripts/services.mjs', import.meta.url).href
)

type ClientOptions = RedisOptions & { replyMapping?: 'legacy' }

/** A client of node-redis. */
export type NodeRedis = ReturnType<typeof createClient>

export interface NodeRedisOptions extends NonNullable<Parameters<typeof createClient>[0]> {
  /** Whoever wants it connects it. */
  lazyConnect?: boolean
}

export interface StartOptions {
  /** Keeps the data over `stop`, `kill` and `start`: each write is on the disk before it is answered. */
  persist?: boolean
  /** Further arguments, as in `['--maxmemory', '8mb']`. */
  config?: string[]
  /** Listens on a free loopback port as well as on the socket. */
  port?: boolean
}

export interface Monitored<T> {
  /** What the function returned. */
  result: T
  /** The commands that clients sent, spelt as they were sent. */
  sent: string[][]
  /** The commands that scripts called. */
  scripted: string[][]
}

/** Where redis-server is, and the environment that it needs. */
export function redisProgram(): { server: string; env: Record<string, string> } {
  const redis = services.findRedis()
  if (!redis) throw new Error('There is no redis-server: run `node scripts/services.mjs`')
  return redis
}

/** A redis-server of the test's own. */
export async function startRedis({
  persist = false,
  config = [],
  port = false
}: StartOptions = {}): Promise<RedisServer> {
  const args = ['--save', '', '--bind', '127.0.0.1']
  args.push(...(persist ? ['--appendonly', 'yes', '--appendfsync', 'always'] : ['--appendonly', 'no']), ...config)
  for (let tries = 1; ; tries++) {
    const server = new RedisServer(args, port ? await freePort() : 0)
    try {
      await server.start()
      return server
    } catch (error) {
      await server.close()
      // Someone else took the port meanwhile.
      const taken = error instanceof Error && error.message.includes('Address already in use')
      if (!taken || tries === 5) throw error
    }
  }
}

export class RedisServer {
  readonly host = '127.0.0.1'
  /** 0 when it listens on the socket only. */
  readonly port: number
  /** Of the unix socket. */
  readonly path: string
  readonly #folder = makeFolder('redis')
  readonly #args: string[]
  readonly #clients = new Set<Redis>()
  readonly #nodeRedis = new Set<NodeRedis>()
  #process: ServerProcess | undefined

  constructor(args: string[], port: number) {
    this.port = port
    this.path = join(this.#folder, 'redis.sock')
    this.#args = ['--dir', this.#folder, '--unixsocket', this.path, '--port', String(port), ...args]
  }

  get url(): string {
    if (!this.port) throw new Error('There is no URL without startRedis({ port: true })')
    return `redis://${this.host}:${this.port}`
  }

  /** Starts it again with the same folder, socket and port; resolves when it answers. */
  async start(): Promise<void> {
    if (this.#process?.running) throw new Error('redis-server is running')
    const redis = redisProgram()
    const server = await launch(redis.server, this.#args, { env: redis.env, log: join(this.#folder, 'redis.log') })
    this.#process = server
    await until(
      () => {
        if (!server.running) throw new Error(`redis-server ended at its start:\n${server.output()}`)
        return this.#answers()
      },
      { message: 'redis-server to answer' }
    )
  }

  /** As an operator would; what is persisted is complete. */
  stop(): Promise<void> {
    return this.#end('SIGTERM')
  }

  /** As the kernel would. */
  kill(): Promise<void> {
    return this.#end('SIGKILL')
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    const server = this.#process
    this.#process = undefined
    if (!server?.running) return
    server.signal(signal)
    server.resume()
    await server.exited
  }

  /** Connections stay open and nothing answers, as when the host hangs or the network drops packets. */
  async pause(): Promise<void> {
    await this.#running().pause()
  }

  resume(): void {
    this.#running().resume()
  }

  #running(): ServerProcess {
    if (!this.#process?.running) throw new Error('redis-server is not running')
    return this.#process
  }

  /** A client on the socket, ready unless `lazyConnect` is asked for. It is disconnected by `close`. */
  async client(options: ClientOptions = {}): Promise<Redis> {
    const client = new Redis({ path: this.path, ...options })
    this.#clients.add(client)
    // Without a listener ioredis prints each failure to connect.
    client.on('error', () => {})
    if (!options.lazyConnect) await once(client, 'ready')
    return client
  }

  /** The same of node-redis. */
  async nodeRedis({ lazyConnect = false, ...options }: NodeRedisOptions = {}): Promise<NodeRedis> {
    const client = createClient({ ...options, socket: { reconnectStrategy: 20, ...options.socket, path: this.path } })
    this.#nodeRedis.add(client)
    // Without a listener an error would end the process.
    client.on('error', () => {})
    if (!lazyConnect) await client.connect()
    return client
  }

  /** Ends the clients and the server, and removes its folder. */
  async close(): Promise<void> {
    for (const client of this.#clients) client.disconnect()
    for (const client of this.#nodeRedis) client.destroy()
    await this.#end('SIGKILL')
    await rm(this.#folder, { recursive: true, force: true })
  }

  /**
   * Every command that the server executed while `fn` ran, whoever sent it, in the order of execution. What Redis
   * keeps from MONITOR is missing: administrative commands such as CONFIG, and what was refused before it ran.
   */
  async commands<T>(fn: () => T | Promise<T>): Promise<Monitored<T>> {
    const seen: MonitorLine[] = []
    const first = { word: `first-${randomUUID()}`, ...latch() }
    const last = { word: `last-${randomUUID()}`, ...latch() }
    const monitor = await this.#monitor((line) => {
      seen.push(line)
      for (const mark of [first, last]) if (line.args[1] === mark.word) mark.open()
    })
    const caughtUp = async ({ word, promise }: typeof first) => {
      await ask(this.path, `ECHO ${word}`)
      await Promise.race([promise, monitor.ended])
    }
    try {
      await caughtUp(first)
      const result = await fn()
      await caughtUp(last)
      const at = ({ word }: typeof first) => seen.findIndex(({ args }) => args[1] === word)
      const lines = seen.slice(at(first) + 1, at(last))
      const by = (scripted: boolean) => lines.filter((line) => line.scripted === scripted).map(({ args }) => args)
      return { result, sent: by(false), scripted: by(true) }
    } finally {
      monitor.end()
    }
  }

  async #answers(): Promise<boolean> {
    return (await ask(this.path, 'PING').catch(() => '')) === '+PONG'
  }

  async #monitor(onLine: (line: MonitorLine) => void): Promise<{ ended: Promise<never>; end(): void }> {
    const socket = connect(this.path)
    const on = latch()
    const ended = new Promise<never>((_, reject) => {
      socket.once('error', reject)
      socket.once('close', () => reject(new Error('The server closed the MONITOR connection')))
    })
    ended.catch(() => {})
    const chunks: string[] = []
    socket.setEncoding('latin1').on('data', (chunk: string) => {
      chunks.push(chunk)
      if (!chunk.includes('\n')) return
      const lines = chunks.splice(0).join('').split('\r\n')
      chunks.push(lines.pop() ?? '')
      for (const line of lines) {
        if (line === '+OK') on.open()
        else onLine(parseMonitorLine(line))
      }
    })
    socket.write('MONITOR\r\n')
    await Promise.race([on.promise, ended])
    return { ended, end: () => void socket.destroy() }
  }
}

interface MonitorLine {
  scripted: boolean
  args: string[]
}

const escapes: Record<string, string> = { n: '\n', r: '\r', t: '\t', a: '\x07', b: '\b' }

/** `+1700000000.123456 [0 unix:/tmp/redis.sock] "set" "key" "\x00\"\n"`, with a character for each byte. */
function parseMonitorLine(line: string): MonitorLine {
  const start = line.indexOf('] "')
  const args: string[] = []
  let at = start + 3
  while (at <= line.length) {
    const from = at
    while (line[at] !== '"') at += line[at] === '\\' ? 2 : 1
    const bytes = line
      .slice(from, at)
      .replace(/\\(?:x(..)|(.))/g, (_, hex, char) =>
        hex ? String.fromCharCode(Number.parseInt(hex, 16)) : (escapes[char] ?? char)
      )
    args.push(Buffer.from(bytes, 'latin1').toString())
    at += '" "'.length
  }
  return { scripted: line.slice(0, start).endsWith(' lua'), args }
}

/** The first line of the reply to a command, on a connection of its own. */
async function ask(path: string, command: string): Promise<string> {
  const socket = connect(path)
  try {
    socket.write(`${command}\r\n`)
    let reply = ''
    for await (const chunk of socket.setEncoding('latin1')) {
      reply += chunk
      if (reply.includes('\r\n')) break
    }
    return reply.slice(0, Math.max(reply.indexOf('\r\n'), 0))
  } finally {
    socket.destroy()
  }
}
