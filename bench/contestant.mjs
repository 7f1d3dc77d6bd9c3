import { fork } from 'node:child_process'
import { fileURLToPath } from 'node:url'

const worker = fileURLToPath(new URL('worker.mjs', import.meta.url))
const living = new Set()
process.on('exit', () => {
  for (const child of living) child.kill('SIGKILL')
})

/** A subject in a process of its own. */
export class Contestant {
  #child
  #calls = new Map()
  #id = 0

  constructor(definition, child) {
    this.name = definition.name
    this.definition = definition
    this.#child = child
    child.on('message', ({ id, result, error }) => {
      const call = this.#calls.get(id)
      this.#calls.delete(id)
      if (error !== undefined) call?.reject(new Error(error))
      else call?.resolve(result)
    })
    child.on('exit', (code, signal) => {
      living.delete(child)
      const error = new Error(`The process of ${this.name} ended: ${signal ?? code}`)
      for (const { reject } of this.#calls.values()) reject(error)
      this.#calls.clear()
    })
  }

  /** `null` when the subject cannot take part, because what it measures does not exist yet. */
  static async start(definition, environment, execArgv = []) {
    const child = fork(worker, [definition.name, JSON.stringify(environment)], {
      execArgv: ['--expose-gc', '--max-old-space-size=6144', ...execArgv],
      stdio: ['ignore', 'ignore', 'inherit', 'ipc']
    })
    living.add(child)
    const ready = await new Promise((resolve, reject) => {
      child.once('message', ({ ready }) => resolve(ready))
      child.once('exit', () => reject(new Error(`The process of ${definition.name} did not start`)))
    })
    const contestant = new Contestant(definition, child)
    if (ready) return contestant
    contestant.end()
    return null
  }

  ask(task, given = {}) {
    const id = ++this.#id
    return new Promise((resolve, reject) => {
      this.#calls.set(id, { resolve, reject })
      this.#child.send({ id, task, ...given })
    })
  }

  /** Ends the process. */
  async end() {
    if (!this.#child.connected) return
    const ended = new Promise((resolve) => this.#child.once('exit', resolve))
    this.#child.disconnect()
    await ended
  }
}
