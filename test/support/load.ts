import http from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { SERVICE } from './app.js'
import { type Exchange, now } from './http-history.js'
import { until } from './latch.js'
import { type Job, ROUTES, type Route } from './load-plan.js'
import type { Random } from './random.js'

export interface LoadOptions {
  random: Random
  /** Who can be asked, at this moment. */
  targets: () => readonly { name: string; url: string }[]
  /** How many requests of a key there are besides retries. */
  duplicates?: number
  /** How many keys are in use at a time. */
  breadth?: number
  /** The handlers take this long at most, in milliseconds. */
  ms?: number
  /** How likely one takes `longest` instead. */
  slow?: number
  longest?: number
  /** How likely a run of a handler fails. */
  fails?: number
  /** How likely a client hangs up before it has its answer, and asks again. */
  hangsUp?: number
  /** A client that has not got a final reply after this many milliseconds gives up. */
  patience?: number
  /** Which routes are asked. */
  routes?: readonly Route[]
  /** Which keys are used. */
  wants?: (key: string) => boolean
}

const PREFIX = 'FST_IDEMPOTENCY_'
/** What says nothing about whether the operation has happened, and invites to ask again. */
const RETRIED = ['IN_PROGRESS', 'STORE_UNAVAILABLE', 'ABANDONED'].map((code) => PREFIX + code)

const DEFAULTS = {
  duplicates: 3,
  breadth: 24,
  ms: 20,
  slow: 0.05,
  longest: 300,
  fails: 0.05,
  hangsUp: 0.03,
  patience: 20_000,
  routes: Object.keys(ROUTES) as Route[],
  wants: () => true
}

/** Clients that ask again, with the same key, until they get a final reply: as real ones should. */
export class Load {
  readonly exchanges: Exchange[] = []
  /** How many keys nobody asks for any more. */
  done = 0
  readonly #options: Required<LoadOptions>
  readonly #agent = new http.Agent({ keepAlive: true, maxSockets: 100 })
  readonly #jobs = new Map<string, Job>()
  #numbers = 0

  constructor(options: LoadOptions) {
    this.#options = { ...DEFAULTS, ...options }
  }

  get keys(): readonly string[] {
    return [...this.#jobs.keys()]
  }

  /** One key after the other, several at a time, until the work that disturbs them is done. */
  async during(disturb: () => Promise<unknown>): Promise<void> {
    let over = false
    const disturbing = disturb().finally(() => {
      over = true
    })
    const work = async () => {
      while (!over) await this.#use(this.#newJob())
    }
    await Promise.all([disturbing, ...Array.from({ length: this.#options.breadth }, work)])
  }

  /** Resolves when so many more keys are done with: on a slow machine that takes longer. */
  async more(count: number): Promise<void> {
    const enough = this.done + count
    await until(() => this.done >= enough, { timeout: 120_000, message: `${count} more keys` })
  }

  /** Asks once more for each key: what was final is to be replayed now. */
  async revisit(keys: readonly string[] = this.keys): Promise<void> {
    const left = [...keys]
    const work = async () => {
      for (let key = left.pop(); key !== undefined; key = left.pop()) {
        await this.#insist(this.#jobs.get(key) as Job, { hangsUp: 0 })
      }
    }
    await Promise.all(Array.from({ length: this.#options.breadth }, work))
  }

  close(): void {
    this.#agent.destroy()
  }

  #newJob(): Job {
    const { random, ms, slow, longest, fails, routes, wants } = this.#options
    let route: Route
    let key: string
    do {
      const n = this.#numbers++
      route = routes[n % routes.length] as Route
      key = `${route} ${n}`
    } while (!wants(key))
    const job = { key, route, ms: random.chance(slow) ? longest : random.between(0, ms), fails }
    this.#jobs.set(key, job)
    return job
  }

  /** Several clients that ask at about the same time, and one later. */
  async #use(job: Job): Promise<void> {
    const { random, duplicates } = this.#options
    const client = async () => {
      if (random.chance(0.6)) await sleep(random.between(1, 30))
      await this.#insist(job)
    }
    await Promise.all(Array.from({ length: duplicates }, client))
    await this.#insist(job)
    this.done++
  }

  /** One client, until it has a final reply, or no hope, or no patience. */
  async #insist(job: Job, { hangsUp = this.#options.hangsUp } = {}): Promise<void> {
    const { random, patience } = this.#options
    const giveUp = now() + patience
    for (let pause = 10; ; pause = Math.min(pause * 1.5, 200)) {
      const hangUp = random.chance(hangsUp) ? random.between(0, 60) : undefined
      const { got, status = 0, code } = await this.#ask(job, hangUp)
      const again = got === null || status >= 500 || RETRIED.includes(code ?? '')
      if (!again || now() > giveUp) return
      await sleep(pause * (0.5 + random.next()))
    }
  }

  async #ask(job: Job, hangUp: number | undefined): Promise<Exchange> {
    const targets = this.#options.targets()
    const { name, url } = targets[this.#options.random.between(0, targets.length - 1)] as { name: string; url: string }
    const payload = JSON.stringify(job)
    const exchange: Exchange = { key: job.key, payload, sent: now(), got: null, worker: name }
    this.exchanges.push(exchange)
    const answer = await this.#post(`${url}/${job.route}`, job.key, payload, hangUp)
    if (answer !== null) Object.assign(exchange, answer, { got: now() })
    return exchange
  }

  #post(
    url: string,
    key: string,
    body: string,
    hangUp: number | undefined
  ): Promise<Pick<Exchange, 'status' | 'code' | 'text' | 'replayed'> | null> {
    const headers = {
      host: SERVICE,
      'content-type': 'application/json',
      'content-length': Buffer.byteLength(body),
      'idempotency-key': `"${key}"`
    }
    return new Promise((resolve) => {
      let timer: NodeJS.Timeout | undefined
      const fail = () => {
        clearTimeout(timer)
        resolve(null)
      }
      const request = http.request(url, { method: 'POST', agent: this.#agent, headers }, (response) => {
        let text = ''
        response.setEncoding('utf8').on('data', (chunk) => {
          text += chunk
        })
        response.on('error', fail)
        response.on('end', () => {
          clearTimeout(timer)
          const { statusCode: status = 0, headers } = response
          const replayed = headers['idempotent-replayed'] === 'true'
          resolve({ status, code: status < 400 ? undefined : JSON.parse(text).code, text, replayed })
        })
      })
      request.on('error', fail)
      if (hangUp !== undefined) timer = setTimeout(() => request.destroy(), hangUp)
      request.end(body)
    })
  }
}
