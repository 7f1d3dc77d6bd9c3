import { Readable } from 'node:stream'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import idempotency, { MemoryStore } from '../../index.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  RequestIdempotency,
  StoredRecord,
  StoredStep
} from '../../types/index.js'
import { Database, type Row } from './plugin-database.js'
import { inNameOf, settled, type TimerOwner, VirtualTime } from './virtual-time.js'

// Processes with the plugin, all in this one, on one store and in virtual time, with everything that befalls them.

/** Milliseconds. Those of one process differ a little from another's, because timers of one length are shared. */
export const LEASE = 30_000
export const WAIT_TIMEOUT = 45_000
export const STORE_TIMEOUT = 2_000
export const TTL = 200_000
export const SHORT_TTL = 20_000

export const ROUTES = ['/reject', '/wait', '/short'] as const
export type Route = (typeof ROUTES)[number]

/** How a handler may end. */
export const ENDS = [
  'reply',
  'refuse',
  'fail',
  'throw',
  'discard',
  'stream',
  'broken stream',
  'too large',
  'hijack'
] as const
export type End = (typeof ENDS)[number]

export const KEYS = ['k', 'l'] as const

/** What a handler may do in steps. The last ones are committed in the transactions of a database. */
export const STEPS = ['a', 'b', 't', 'u'] as const
export type StepName = (typeof STEPS)[number]
export const isTransactional = (name: string): boolean => name === 't' || name === 'u'
/** `slow`: what it does comes to its end when it is told to. */
export type StepEnd = 'done' | 'slow' | 'failed'

/** What becomes of the next call that stores a step: it fails, before or after it is done, or is late. */
export const STEP_FAULTS = ['fails', 'answer lost', 'late', 'answer late'] as const
export type StepFault = (typeof STEP_FAULTS)[number]
/** How late. Nobody waits for so long. */
export const LATE = 5_000

export type Call = 'acquire' | 'renew' | 'complete' | 'release'

export interface Asked {
  id: string
  process: Process
  key: string
  payload: string
  route: Route
  /** When it has come to the process. */
  sent: number
  run: Running | null
  answer: Answer | null
  /** The client has hung up, or the process has died. */
  gone: boolean
  hangUp: () => void
}

export interface Answer {
  status: number
  code: string | undefined
  text: string
  replayed: boolean
}

export interface Running {
  id: string
  asked: Asked
  attempt: number
  signal: AbortSignal
  ended: End | null
  end: (how: End) => void
  /** The steps that it is at, and the names that it cannot use any more. */
  steps: Set<Stepping>
  used: Set<StepName>
  step: (name: StepName, how: StepEnd) => void
}

/** A step that a run is at. */
export interface Stepping {
  name: StepName
  how: StepEnd
  /** The run knew that it had lost its key. */
  knew: boolean
  /** What is to be done once has begun. */
  worked: boolean
  /** Ends what it does, if that is slow and has begun. */
  finish: (() => void) | null
}

/** Who wants to know what happens. */
export interface Witness {
  started(run: Running): void
  answered(asked: Asked, answer: Answer): void
  /** A call was done by the store, but its caller has not been told. */
  lost(process: Process, call: Call, key: string, takeover: boolean): void
  /** The store was to keep a step, and its caller has not been told, or nothing came of it. */
  stepFails(process: Process, key: string, name: string, how: StepFault): void
  /** A step does now what is to be done once. */
  worked(run: Running, step: Stepping): void
  committed(run: Running, name: string, row: Row): void
  /** What a step has given, or the error. */
  stepped(run: Running, step: Stepping, result: string | Error): void
}

type Plugin = typeof idempotency

export interface WorldOptions {
  plugin?: Plugin
  /** What stands between a process and the store. */
  between?: (store: IdempotencyStore) => IdempotencyStore
}

export class World {
  readonly time = new VirtualTime()
  readonly processes: Process[] = []
  readonly store = new MemoryStore()
  readonly database = new Database()
  readonly witness: Witness
  readonly options: WorldOptions
  #started = 0
  #asked = 0
  #runs = 0
  #ticks = 0

  constructor(witness: Witness, options: WorldOptions = {}) {
    this.witness = witness
    this.options = options
    this.time.install()
  }

  /** For the order of things, which may all happen at the same time. */
  tick(): number {
    return ++this.#ticks
  }

  async start(slot: number): Promise<Process> {
    const started = new Process(this, `p${slot}.${this.#started}`, this.#started++)
    this.processes[slot] = started
    await started.start()
    return started
  }

  asked(process: Process, key: string, payload: string, route: Route): Asked {
    const hangUp = () => {}
    const id = `q${++this.#asked}`
    return { id, process, key, payload, route, sent: 0, run: null, answer: null, gone: false, hangUp }
  }

  /** The store forgets all that it has. */
  async forget(): Promise<void> {
    for (const key of KEYS) await inNameOf(null, () => this.store.delete(storageKey(null, key)))
  }

  nextRun(): string {
    return `r${++this.#runs}`
  }

  /** Ends all processes, dead or alive. Returns how many timers are left then. */
  async close(all: readonly Process[]): Promise<number> {
    try {
      const closed = Promise.all(all.map((process) => process.close()))
      let open = true
      void closed.then(() => {
        open = false
      })
      for (let n = 0; open && n < 100; n++) await this.time.pass(10_000)
      if (open) throw new Error('The processes do not close')
      await this.store.close()
      await this.time.pass(100_000)
      return this.time.pending
    } finally {
      this.time.uninstall()
    }
  }
}

export class Process implements TimerOwner {
  readonly world: World
  readonly name: string
  readonly lease: number
  readonly waitTimeout: number
  stopped = false
  dead = false
  /** The store cannot be reached. */
  cut = false
  /** Calls whose next answer gets lost. */
  readonly losing = new Set<Call>()
  stepFault: StepFault | null = null
  readonly running = new Map<string, Running>()
  readonly asked: Asked[] = []
  #queue: Asked[] = []
  #closing = false
  #wake: (() => void)[] = []
  /** Resolves when it has died. */
  readonly death: Promise<void>
  #die!: () => void
  #app!: FastifyInstance

  constructor(world: World, name: string, number: number) {
    this.world = world
    this.name = name
    // Divisible by three, so that renewals fall on whole milliseconds.
    this.lease = LEASE + 3 * number
    this.waitTimeout = WAIT_TIMEOUT + number
    this.death = new Promise((resolve) => {
      this.#die = resolve
    })
  }

  async start(): Promise<void> {
    await inNameOf(this, async () => {
      const app = Fastify() as unknown as FastifyInstance
      this.#app = app
      const client = new Client(this, this.world.store)
      await app.register(this.world.options.plugin ?? idempotency, {
        store: this.world.options.between?.(client) ?? client,
        lease: this.lease,
        waitTimeout: this.waitTimeout,
        storeTimeout: STORE_TIMEOUT + Number(this.name.split('.')[1]),
        ttl: TTL,
        maxReplySize: 100
      })
      const handler = (request: FastifyRequest, reply: FastifyReply) => this.#handle(request, reply)
      app.addHook('onRequest', async (request, reply) => {
        const asked = this.#askedIn(request)
        asked.hangUp = () => reply.raw.destroy()
      })
      app.post('/reject', { config: { idempotency: true } }, handler)
      app.post('/wait', { config: { idempotency: { onConflict: 'wait' } } }, handler)
      app.post('/short', { config: { idempotency: { ttl: SHORT_TTL } } }, handler)
      await app.ready()
    })
  }

  /** A request arrives, or is on its way for as long as the process is stopped. */
  send(asked: Asked): void {
    this.asked.push(asked)
    if (this.stopped) this.#queue.push(asked)
    else this.#deliver(asked)
  }

  stop(): void {
    this.stopped = true
  }

  async resume(): Promise<void> {
    this.stopped = false
    for (const wake of this.#wake.splice(0)) wake()
    // What is overdue comes first, then what has come in meanwhile.
    await this.world.time.pass(0)
    for (const asked of this.#queue.splice(0)) {
      this.#deliver(asked)
      await settled()
    }
  }

  /** Nothing is heard of it any more. */
  die(): void {
    this.stopped = true
    this.dead = true
    this.#die()
    for (const asked of this.asked) if (asked.answer === null) asked.gone = true
  }

  delete(key: string): Promise<boolean> {
    return inNameOf(this, () => this.#app.idempotency.delete(key))
  }

  look(key: string): Promise<Acquisition | null> {
    return inNameOf(this, () => this.#app.idempotency.get(key))
  }

  /** Resolves when it is awake, and never if it is dead. */
  async awake(): Promise<void> {
    while (this.stopped) await new Promise<void>((resolve) => this.#wake.push(resolve))
  }

  get closing(): boolean {
    return this.#closing
  }

  /** The dead are awakened too, so that nothing is left of them. */
  async close(): Promise<void> {
    this.#closing = true
    this.stopped = false
    for (const wake of this.#wake.splice(0)) wake()
    for (const { end, steps } of this.running.values()) {
      for (const { finish } of steps) finish?.()
      end('fail')
    }
    await inNameOf(this, () => this.#app.close())
  }

  #deliver(asked: Asked): void {
    const { id, key, payload, route } = asked
    asked.sent = this.world.time.now
    const answered = inNameOf(this, async () =>
      this.#app.inject({
        method: 'POST',
        url: route,
        headers: { 'idempotency-key': key, 'x-id': id },
        payload: { payload }
      })
    )
    answered.then(
      ({ statusCode, payload, headers }) => {
        if (asked.gone || this.#closing) return
        const isError = statusCode >= 400 && payload.startsWith('{')
        const code: string | undefined = isError ? JSON.parse(payload).code : undefined
        const replayed = headers['idempotent-replayed'] === 'true'
        asked.answer = { status: statusCode, code, text: isError ? '' : payload, replayed }
        this.world.witness.answered(asked, asked.answer)
      },
      () => {
        // The reply broke off.
        asked.gone = true
      }
    )
  }

  #askedIn({ headers }: FastifyRequest): Asked {
    return this.asked.find(({ id }) => id === headers['x-id']) as Asked
  }

  async #handle(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    const asked = this.#askedIn(request)
    const { idempotency } = request
    const id = this.world.nextRun()
    const how = await new Promise<End>((end) => {
      const run: Running = {
        id,
        asked,
        attempt: idempotency?.attempt ?? -1,
        signal: (idempotency as NonNullable<typeof idempotency>).signal,
        ended: null,
        end: (how) => {
          this.running.delete(id)
          end(how)
        },
        steps: new Set(),
        used: new Set(),
        step: (name, how) => void this.#step(run, idempotency as RequestIdempotency, name, how)
      }
      asked.run = run
      this.running.set(id, run)
      this.world.witness.started(run)
    })
    const { status, text } = saying(how, id)
    reply.code(status)
    switch (how) {
      case 'throw':
        throw Object.assign(new Error(text), { statusCode: status })
      case 'discard':
        idempotency?.discard()
        return text
      case 'stream':
        return reply.type('text/plain').send(Readable.from([text.slice(0, 2), text.slice(2)], { objectMode: false }))
      case 'broken stream':
        return reply.type('text/plain').send(Readable.from(breaking(text)))
      case 'hijack':
        reply.hijack()
        reply.raw.end(text)
        return
      default:
        return text
    }
  }

  async #step(run: Running, { step, signal }: RequestIdempotency, name: StepName, how: StepEnd): Promise<void> {
    const { witness, database } = this.world
    const stepping: Stepping = { name, how, knew: signal.aborted, worked: false, finish: null }
    run.steps.add(stepping)
    run.used.add(name)
    const work = async () => {
      stepping.worked = true
      if (!this.#isGone) witness.worked(run, stepping)
      if (how === 'slow' && !this.#isGone) await new Promise<void>((finish) => Object.assign(stepping, { finish }))
      stepping.finish = null
      if (how === 'failed') throw new Error('The step has failed')
      return resultOf(name, run.id)
    }
    const transactions = database.of(this, (row) => witness.committed(run, name, row))
    let result: string | Error
    try {
      result = await (isTransactional(name) ? step(name, transactions, work) : step(name, work))
    } catch (error) {
      result = error as Error
      run.used.delete(name)
    }
    run.steps.delete(stepping)
    if (!this.#isGone) witness.stepped(run, stepping, result)
  }

  /** Nobody looks at what it does. */
  get #isGone(): boolean {
    return this.dead || this.#closing
  }
}

/** What a step gives that a run has done. */
export function resultOf(name: string, run: string): string {
  return `${name} of ${run}`
}

async function* breaking(text: string): AsyncGenerator<Buffer> {
  yield Buffer.from(text.slice(0, 2))
  throw new Error('The stream has broken')
}

/** What a run says that ends so. */
export function saying(how: End, run: string): { status: number; text: string } {
  const text = `${how} of ${run}`
  if (how === 'fail') return { status: 503, text }
  if (how === 'throw') return { status: 500, text: '' }
  if (how === 'refuse') return { status: 400, text }
  if (how === 'hijack') return { status: 200, text }
  return { status: 201, text: how === 'too large' ? text.padEnd(200, '!') : text }
}

const never = new Promise<never>(() => {})

/** A process's connection to the store. */
class Client implements IdempotencyStore {
  readonly #process: Process
  readonly #store: MemoryStore

  constructor(process: Process, store: MemoryStore) {
    this.#process = process
    this.#store = store
  }

  acquire(key: string, claim: Claim): Promise<Acquisition> {
    return this.#call('acquire', key, () => this.#store.acquire(key, claim), claim.takeover)
  }

  renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#call('renew', key, () => this.#store.renew(key, token, leaseMs))
  }

  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    return this.#call('complete', key, () => this.#store.complete(key, token, record, ttlMs))
  }

  step(key: string, token: string, step: StoredStep): Promise<boolean> {
    return this.#call('step', key, () => this.#step(key, token, step))
  }

  async #step(key: string, token: string, step: StoredStep): Promise<boolean> {
    const fault = this.#process.stepFault
    if (fault === null) return this.#store.step(key, token, step)
    this.#process.stepFault = null
    this.#process.world.witness.stepFails(this.#process, key, step[0], fault)
    if (fault === 'fails') throw new Error('The store has failed')
    const late = () => new Promise<void>((resolve) => void setTimeout(resolve, LATE))
    if (fault === 'late') await late()
    const answer = await this.#store.step(key, token, step)
    if (fault === 'answer lost') throw new Error('The answer got lost')
    if (fault === 'answer late') await late()
    return answer
  }

  release(key: string, token: string, unused?: boolean): Promise<boolean> {
    return this.#call('release', key, () => this.#store.release(key, token, unused))
  }

  get(key: string): Promise<Acquisition | null> {
    return this.#call('get', key, () => this.#store.get(key))
  }

  delete(key: string): Promise<boolean> {
    return this.#call('delete', key, () => this.#store.delete(key))
  }

  async changed(key: string, signal: AbortSignal): Promise<void> {
    if (this.#process.cut) throw new Error('The store is not there')
    await inNameOf(null, () => this.#store.changed(key, signal))
    await this.#process.awake()
  }

  async #call<T>(
    name: Call | 'step' | 'get' | 'delete',
    key: string,
    call: () => Promise<T>,
    takeover = false
  ): Promise<T> {
    const process = this.#process
    if (process.closing || process.cut) throw new Error('The store is not there')
    await process.awake()
    const answer = await inNameOf(null, call)
    await process.awake()
    if (process.dead) return never
    if (process.losing.delete(name as Call)) {
      process.world.witness.lost(process, name as Call, key, takeover)
      throw new Error('The answer got lost')
    }
    return answer
  }
}
