import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'
import type { Absence, Run } from './http-history.js'
import { until } from './latch.js'
import type { RunLine, WorkerSetup } from './load-plan.js'
import { launch, makeFolder, type ServerProcess } from './process.js'

const script = fileURLToPath(new URL('./load-worker.js', import.meta.url))

/** One worker: a server in a process of its own. */
export interface Worker {
  readonly name: string
  readonly url: string
  readonly process: ServerProcess
}

/** Workers that run the handlers of a load, and what they say of their runs. */
export class Fleet {
  readonly workers: Worker[] = []
  readonly #folder = makeFolder('fleet')
  readonly #started: Worker[] = []
  readonly #sent = new Set<ServerProcess>()
  #count = 0

  constructor(t: Test) {
    t.teardown(async () => {
      for (const { process } of this.#started) process.signal('SIGKILL')
      for (const { process } of this.#started) await process.exited
    })
  }

  async start(setup: Omit<WorkerSetup, 'name' | 'runs'>): Promise<Worker> {
    const name = `worker ${++this.#count}`
    const given: WorkerSetup = { ...setup, name, runs: this.#file(name) }
    const log = join(this.#folder, `${name}.log`)
    // What a worker complains of is looked at; that its leases are short is meant.
    const args = ['--disable-warning=FST_IDEMPOTENCY_DURATION', script, JSON.stringify(given)]
    const process = await launch(globalThis.process.execPath, args, { log })
    const listening = () => {
      if (!process.running) throw new Error(`${name} ended at its start:\n${process.output()}`)
      return /^http:\S+/m.exec(process.output())?.[0]
    }
    const url = (await until(listening, { message: 'a worker to listen' })) as string
    const worker = { name, url, process }
    this.workers.push(worker)
    this.#started.push(worker)
    return worker
  }

  /** As a deployment does it: the worker is told to end, still asked for a while, and gone when it has ended. */
  async retire(worker: Worker): Promise<void> {
    this.#sent.add(worker.process)
    worker.process.signal('SIGTERM')
    await worker.process.exited
    this.workers.splice(this.workers.indexOf(worker), 1)
  }

  /** Those that ended although nobody told them to, and what any has said on its way. */
  get trouble(): string[] {
    return this.#started.flatMap(({ name, process }) => {
      const said = process.output().replace(/^http:\S+\n/, '')
      const gone = !process.running && !this.#sent.has(process)
      return gone || said !== '' ? [`${name} ${gone ? 'ended' : 'said'}: ${said}`] : []
    })
  }

  /** All runs so far, and the times in which a worker did not get on. */
  seen(): { runs: Run[]; absences: Absence[] } {
    const runs = new Map<string, Run>()
    const absences: Absence[] = []
    for (const { name } of this.#started) {
      const file = this.#file(name)
      const lines = existsSync(file) ? readFileSync(file, 'utf8').split('\n') : []
      for (const line of lines) {
        if (line === '') continue
        const said = JSON.parse(line) as RunLine
        if ('from' in said) absences.push(said)
        else if ('started' in said) runs.set(said.id, { ...said, ended: null })
        else Object.assign(runs.get(said.id) as Run, said)
      }
    }
    return { runs: [...runs.values()], absences }
  }

  #file(name: string): string {
    return join(this.#folder, `${name}.runs`)
  }
}
