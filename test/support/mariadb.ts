import { rm } from 'node:fs/promises'
import { userInfo } from 'node:os'
import { join } from 'node:path'
import { createPool, type Pool, type PoolOptions } from 'mysql2/promise'
import { until } from './latch.js'
import { launch, makeFolder, type ServerProcess } from './process.js'

// The compiled file is in .build/test/support. The address is computed so that the compiler does not follow it.
const services: { findMariadb(): { server: string; args: string[]; env: Record<string, string> } | null } =
  await import(new URL('../../../scripts/services.mjs', import.meta.url).href)

/**
 * A MariaDB server of the test's own, on a unix socket, with a database `test`.
 * @param settings arguments of the server
 */
export async function startMariadb(...settings: string[]): Promise<MariadbServer> {
  const server = new MariadbServer(settings)
  try {
    await server.start()
    return server
  } catch (error) {
    await server.close()
    throw error
  }
}

/** What does not have to survive the machine. Without tables of privileges none have to be installed. */
const SETTINGS = [
  '--skip-networking',
  '--skip-grant-tables',
  '--innodb-flush-log-at-trx-commit=0',
  '--innodb-buffer-pool-size=16M',
  // What has no place on a small machine, or in a container.
  '--innodb-use-native-aio=0'
]

export class MariadbServer {
  readonly #settings: readonly string[]
  readonly #folder = makeFolder('mariadb')
  /** The path of the unix socket. */
  readonly socket = join(this.#folder, 'socket')
  readonly #pools = new Set<Pool>()
  #process: ServerProcess | undefined

  constructor(settings: readonly string[]) {
    this.#settings = settings
  }

  async start(): Promise<void> {
    const mariadb = services.findMariadb()
    if (!mariadb) throw new Error('There is no MariaDB: run `node scripts/services.mjs`')
    const data = `--datadir=${this.#folder}`
    const own = [data, `--socket=${this.socket}`, `--pid-file=${this.#folder}/pid`, `--user=${userInfo().username}`]
    const args = ['--no-defaults', ...mariadb.args, ...own, ...SETTINGS, ...this.#settings]
    const log = join(this.#folder, 'log')
    const server = await launch(mariadb.server, args, { env: mariadb.env, log })
    this.#process = server
    const pool = createPool({ socketPath: this.socket, connectionLimit: 1 })
    try {
      await until(
        () => {
          if (!server.running) throw new Error(`mariadbd ended at its start:\n${server.output()}`)
          return pool.query('CREATE DATABASE IF NOT EXISTS test').catch(() => false)
        },
        { message: 'mariadbd to answer' }
      )
    } finally {
      await pool.end()
    }
  }

  get pid(): number | undefined {
    return this.#process?.pid
  }

  /** Kills it: what it has said to be kept is on its disk, with `--innodb-flush-log-at-trx-commit=1`. `start` brings it back. */
  async kill(): Promise<void> {
    this.#process?.signal('SIGKILL')
    await this.#process?.exited
  }

  /** For programs that take a URL. */
  get url(): string {
    return `mysql://root@localhost/test?socketPath=${encodeURIComponent(this.socket)}`
  }

  /** A pool on the socket. It is ended by `close`. */
  pool(options: PoolOptions = {}): Pool {
    const pool = createPool({ socketPath: this.socket, database: 'test', ...options })
    this.#pools.add(pool)
    return pool
  }

  /** Ends the pools and the server, and removes its folder. */
  async close(): Promise<void> {
    for (const pool of this.#pools) await pool.end().catch(() => {})
    if (this.#process?.running) await this.kill()
    await rm(this.#folder, { recursive: true, force: true })
  }
}
