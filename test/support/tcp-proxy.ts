import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import type { Random } from './random.js'

type Target = { path: string } | { host: string; port: number }

/** A connection through the proxy. */
interface Line {
  readonly client: Socket
  readonly server: Socket
  /** Nothing passes any more, in either direction, and neither end is told. */
  dead: boolean
  /** The next answer gets lost, and the connection with it. */
  doomed: boolean
  /** What is under way, in each direction: bytes keep their order. */
  readonly queues: Record<'out' | 'back', { chunk: Buffer; due: number }[]>
}

/** What a proxy does to the connections through it. Nothing at first. */
export interface Trouble {
  /** What comes is passed on after this many milliseconds at most, in each direction. */
  delay?: number
  /** How likely a chunk of commands is lost before the server has it, and its connection breaks. */
  loseCommands?: number
  /** How likely a chunk of commands is carried out, its answer is lost, and its connection breaks. */
  loseAnswers?: number
}

/** Where what goes this way is going. */
const ENDS = { out: 'server', back: 'client' } as const

/** A TCP proxy on a free loopback port, in front of one server. */
export class TcpProxy {
  readonly host = '127.0.0.1'
  /** How often each kind of trouble has struck. */
  readonly struck = { delayed: 0, lostCommands: 0, lostAnswers: 0, dead: 0 }
  readonly #server: Server
  readonly #target: Target
  readonly #random: Random
  readonly #lines = new Set<Line>()
  #trouble: Trouble = {}
  #swallows = false

  private constructor(target: Target, random: Random) {
    this.#target = target
    this.#random = random
    this.#server = createServer((client) => this.#join(client))
  }

  static async to(target: Target, random: Random): Promise<TcpProxy> {
    const proxy = new TcpProxy(target, random)
    proxy.#server.listen(0, proxy.host).unref()
    await once(proxy.#server, 'listening')
    return proxy
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port
  }

  set trouble(trouble: Trouble) {
    this.#trouble = trouble
  }

  /** Connections, old and new ones, stay open and swallow everything: as when the other end has lost its power. */
  swallow(): void {
    this.#swallows = true
    for (const line of this.#lines) this.#bury(line)
  }

  /** New connections are as they should be. Those that have swallowed something stay as they are. */
  heal(): void {
    this.#swallows = false
    this.#trouble = {}
  }

  /** All connections break, with what is under way. */
  cut(): void {
    for (const { client, server } of this.#lines) for (const end of [client, server]) end.destroy()
  }

  async close(): Promise<void> {
    this.cut()
    this.#server.close()
    await once(this.#server, 'close')
  }

  #join(client: Socket): void {
    const server = connect(this.#target as { path: string })
    const line: Line = { client, server, dead: false, doomed: false, queues: { out: [], back: [] } }
    this.#lines.add(line)
    for (const end of [client, server]) {
      end.setNoDelay(true)
      end.unref()
      end.on('error', () => {})
    }
    client.on('data', (chunk) => this.#out(line, chunk))
    server.on('data', (chunk) => this.#back(line, chunk))
    const end = (one: Socket, other: Socket) => () => {
      // A peer without power does not say good-bye either.
      if (line.dead && one === server) return
      other.destroy()
      this.#lines.delete(line)
    }
    client.on('close', end(client, server))
    server.on('close', end(server, client))
    if (this.#swallows) this.#bury(line)
  }

  #bury(line: Line): void {
    if (line.dead) return
    line.dead = true
    this.struck.dead++
  }

  #out(line: Line, chunk: Buffer): void {
    if (line.dead) return
    const { loseCommands = 0, loseAnswers = 0 } = this.#trouble
    if (this.#random.chance(loseCommands)) {
      this.struck.lostCommands++
      line.client.destroy()
      return
    }
    if (!line.doomed && this.#random.chance(loseAnswers)) line.doomed = true
    this.#pass(line, 'out', chunk)
  }

  #back(line: Line, chunk: Buffer): void {
    if (line.dead) return
    if (line.doomed) {
      this.struck.lostAnswers++
      line.client.destroy()
      return
    }
    this.#pass(line, 'back', chunk)
  }

  #pass(line: Line, way: 'out' | 'back', chunk: Buffer): void {
    const queue = line.queues[way]
    const { delay = 0 } = this.#trouble
    if (delay === 0 && queue.length === 0) {
      line[ENDS[way]].write(chunk)
      return
    }
    this.struck.delayed++
    queue.push({ chunk, due: performance.now() + this.#random.next() * delay })
    if (queue.length === 1) this.#passNext(line, way)
  }

  #passNext(line: Line, way: 'out' | 'back'): void {
    const queue = line.queues[way]
    const [next] = queue
    if (next === undefined) return
    setTimeout(
      () => {
        const end = line[ENDS[way]]
        // What was under way when the connection died never arrives.
        if (line.dead || end.destroyed) return
        end.write(next.chunk)
        queue.shift()
        this.#passNext(line, way)
      },
      Math.max(0, next.due - performance.now())
    )
  }
}
