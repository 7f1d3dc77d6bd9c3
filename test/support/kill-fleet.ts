import { randomUUID } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Test } from 'tap'
import type { KillNote } from './kill-note.js'
import { until } from './latch.js'
import { launch, type ServerProcess } from './process.js'
import type { Random } from './random.js'

// The supervisor of workers that kill themselves.

export interface Worker {
  readonly name: string
  readonly url: string
  readonly process: ServerProcess
}

export interface FleetSetup {
  /** What node runs: a server that prints its URL. */
  args: string[]
  /** On top of KILLS_FOLDER and WORKER, its name. */
  env: Record<string, string>
  /** For the logs and the notes of kills. */
  folder: string
  random: Random
  /** Comes between the death of a worker and its replacement. */
  killed?: () => Promise<void>
}

/** Some workers, each of which is replaced as soon as it is dead. */
export class Fleet<Kill extends KillNote = KillNote> {
  readonly #kills: string
  readonly #setup: FleetSetup
  readonly #workers = new Set<Worker>()
  readonly #living = new Set<ServerProcess>()
  readonly #slots: Promise<void>[]
  /** When those were killed that did not do it themselves, by Date.now(). */
  readonly #killed = new Map<string, number>()
  #closed = false
  /** A worker that has ended without a kill. */
  #broken: Error | null = null

  static async start<Kill extends KillNote = KillNote>(
    t: Test,
    count: number,
    setup: FleetSetup
  ): Promise<Fleet<Kill>> {
    const fleet = new Fleet<Kill>(count, setup)
    t.teardown(() => fleet.close())
    await until(() => fleet.all().length === count, { message: 'the workers to listen' })
    return fleet
  }

  private constructor(count: number, setup: FleetSetup) {
    this.#setup = setup
    this.#kills = join(setup.folder, randomUUID())
    mkdirSync(this.#kills)
    this.#slots = Array.from({ length: count }, () => this.#slot())
  }

  /** Those that listen. */
  all(): Worker[] {
    if (this.#broken !== null) throw this.#broken
    return [...this.#workers]
  }

  /** One of those that listen, if there is any. */
  any(): Worker | undefined {
    const workers = this.all()
    return workers[this.#setup.random.between(0, workers.length - 1)]
  }

  kills(): Kill[] {
    const names = readdirSync(this.#kills).filter((name) => !name.startsWith('.'))
    return names.map((name) => JSON.parse(readFileSync(join(this.#kills, name), 'utf8')))
  }

  /** Kills one of them, which is replaced. */
  async kill({ name, process }: Worker): Promise<void> {
    this.#killed.set(name, Date.now())
    process.signal('SIGKILL')
    await process.exited
  }

  /** When which worker was killed. */
  deaths(): Map<string, number> {
    return new Map([...this.#killed, ...this.kills().map(({ worker, at }) => [worker, at] as const)])
  }

  async close(): Promise<void> {
    this.#closed = true
    for (const process of this.#living) process.signal('SIGKILL')
    await Promise.all(this.#slots)
  }

  async #slot(): Promise<void> {
    while (!this.#closed && this.#broken === null) {
      try {
        await this.#life()
      } catch (error) {
        this.#broken = error as Error
      }
    }
  }

  async #life(): Promise<void> {
    const name = randomUUID()
    const { args, folder, killed } = this.#setup
    const env = { ...this.#setup.env, KILLS_FOLDER: this.#kills, WORKER: name }
    const child = await launch(process.execPath, args, { env, log: join(folder, `${name}.log`) })
    this.#living.add(child)
    if (this.#closed) child.signal('SIGKILL')
    const url = () => /^http:\S+/m.exec(child.output())?.[0]
    await until(() => !child.running || url(), { message: 'a worker to listen' })
    const worker = { name, process: child, url: url() ?? '' }
    if (child.running) this.#workers.add(worker)
    await child.exited
    this.#workers.delete(worker)
    this.#living.delete(child)
    if (this.#closed) return
    if (!this.deaths().has(name)) {
      throw new Error(`A worker ended, and not by a kill:\n${child.output()}`)
    }
    await killed?.()
  }
}
