import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { Happening, Side } from './feed.js'
import type { FromShop, ToShop } from './shop-server.js'

export interface ShopHooks {
  onHappening(happening: Happening): void
  onRun(side: Side): void
  onKilled(pid: number): void
  onStarted(pid: number): void
}

/** The shop in a process of its own, which is started again when it was killed. */
export class ShopProcess {
  storeIsStopped = false
  readonly #env: Record<string, string>
  readonly #hooks: ShopHooks
  #child: ChildProcess | null = null
  #port: Promise<number> = Promise.reject(new Error('The shop is not started'))
  #onStoreStopped = () => {}

  constructor(env: Record<string, string>, hooks: ShopHooks) {
    this.#env = env
    this.#hooks = hooks
    this.#port.catch(() => {})
  }

  get pid(): number | null {
    return this.#child?.pid ?? null
  }

  /** Where it listens; while it does not, when it does again. */
  get port(): Promise<number> {
    return this.#port
  }

  /** @returns when it listens. */
  start(): Promise<number> {
    const child = fork(fileURLToPath(new URL('shop-server.js', import.meta.url)), {
      env: { ...process.env, ...this.#env }
    })
    this.#port = new Promise((resolve, reject) => {
      child.on('message', (message: FromShop) => {
        if ('port' in message) {
          this.#child = child
          this.#hooks.onStarted(child.pid as number)
          resolve(message.port)
        } else if ('run' in message) this.#hooks.onRun(message.run)
        else if ('happening' in message) this.#hooks.onHappening(message.happening)
        else {
          this.storeIsStopped = message.storeStopped
          this.#onStoreStopped()
        }
      })
      child.once('exit', () => reject(new Error('The shop has ended before it listened')))
    })
    // Whoever waits for it is told; that nobody does is no reason to end.
    this.#port.catch(() => {})
    return this.#port
  }

  /** As `kill -9` does, without a word; and starts another one. */
  async kill(): Promise<void> {
    const child = this.#child
    if (child === null) return
    this.#child = null
    const end = once(child, 'exit')
    // Whoever comes from now on waits for the next one.
    const next = end.then(() => this.start())
    this.#port = next
    next.catch(() => {})
    child.kill('SIGKILL')
    await end
    this.storeIsStopped = false
    this.#hooks.onKilled(child.pid as number)
  }

  /** @returns when the shop has done it. */
  stopStore(stopStore: boolean): Promise<void> {
    return new Promise((resolve) => {
      this.#onStoreStopped = resolve
      if (this.#child === null) resolve()
      else this.#child.send({ stopStore } satisfies ToShop)
    })
  }

  async close(): Promise<void> {
    const child = this.#child
    this.#child = null
    if (child === null) return
    const end = once(child, 'exit')
    child.disconnect()
    await end
  }
}
