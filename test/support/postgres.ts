import { execFileSync, spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { chmodSync, chownSync, existsSync, readFileSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { Pool, type PoolConfig } from 'pg'
import { until } from './latch.js'
import { launch, makeFolder, type ServerProcess } from './process.js'

// The compiled file is in .build/test/support. The address is computed so that the compiler does not follow it.
const services: { findPostgres(): { bin: string; env: Record<string, string> } | null } = await import(
  new URL('../../../scripts/services.mjs', import.meta.url).href
)

export interface StartOptions {
  /** Settings of the server, as in `{ max_connections: '20' }`. */
  config?: Record<string, string>
}

/** A PostgreSQL server of the test's own, on a unix socket. */
export async function startPostgres({ config = {} }: StartOptions = {}): Promise<PostgresServer> {
  const server = new PostgresServer(config)
  try {
    await server.start()
    return server
  } catch (error) {
    await server.close()
    throw error
  }
}

/** What does not have to survive the machine: only processes are killed here. */
const SETTINGS = {
  listen_addresses: '',
  fsync: 'off',
  full_page_writes: 'off',
  max_connections: '200',
  shared_buffers: '32MB',
  jit: 'off',
  log_statement: 'all',
  log_min_messages: 'warning',
  log_line_prefix: '%p '
}

export class PostgresServer {
  /** The folder of the unix socket, which is what clients call the host. */
  readonly host = makeFolder('postgres')
  readonly user = 'postgres'
  readonly database = 'postgres'
  readonly #config: Record<string, string>
  readonly #data = join(this.host, 'data')
  readonly #log = join(this.host, 'log')
  readonly #pools = new Set<Pool>()
  #process: ServerProcess | undefined

  constructor(config: Record<string, string>) {
    this.#config = { ...SETTINGS, ...config, unix_socket_directories: this.host }
  }

  /** Of the first process, as long as it runs. */
  get pid(): number {
    if (!this.#process?.running) throw new Error('postgres is not running')
    return this.#process.pid
  }

  /** For programs that take a URL. */
  get url(): string {
    return `postgresql://${this.user}@/${this.database}?host=${encodeURIComponent(this.host)}`
  }

  /** Starts it, or starts it again with the same data; resolves when it answers. */
  async start(): Promise<void> {
    if (this.#process?.running) throw new Error('postgres is running')
    const postgres = services.findPostgres()
    if (!postgres) throw new Error('There is no PostgreSQL: run `node scripts/services.mjs`')
    const command = (program: string) => asOrdinaryUser(join(postgres.bin, program), this.host)
    if (!existsSync(this.#data)) {
      const [file, args] = command('initdb')
      const options = ['-D', this.#data, '-U', this.user, '-A', 'trust', '-E', 'UTF8', '--no-locale', '--no-sync']
      execFileSync(file, [...args, ...options], { env: { ...process.env, ...postgres.env }, stdio: 'pipe' })
    }
    const [file, args] = command('postgres')
    const settings = Object.entries(this.#config).flatMap(([name, value]) => ['-c', `${name}=${value}`])
    const server = await launch(file, [...args, '-D', this.#data, ...settings], { env: postgres.env, log: this.#log })
    this.#process = server
    const pool = new Pool({ ...this.#address, max: 1, idleTimeoutMillis: 1 })
    pool.on('error', () => {})
    try {
      await until(
        () => {
          if (!server.running) throw new Error(`postgres ended at its start:\n${server.output()}`)
          return pool.query('SELECT').catch(() => false)
        },
        { message: 'postgres to answer' }
      )
    } finally {
      await pool.end()
    }
  }

  /** As an operator in a hurry would: transactions are rolled back. */
  stop(): Promise<void> {
    return this.#end('SIGINT')
  }

  /** As after a crash: nothing is tidied up. */
  kill(): Promise<void> {
    return this.#end('SIGQUIT')
  }

  /** The postmaster alone: what its children are at they may bring to an end. */
  murder(): Promise<void> {
    return this.#end('SIGKILL')
  }

  /** Stops processes of the server for a while. Whatever happens to this process, they go on afterwards. */
  async freeze(pids: number[], ms: number): Promise<void> {
    const script = 'for s in STOP CONT; do kill -$s "$@" 2>/dev/null; [ $s = STOP ] && sleep "$0"; done'
    const shell = spawn('/bin/sh', ['-c', script, String(ms / 1_000), ...pids.map(String)], { stdio: 'ignore' })
    await once(shell, 'exit')
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    const server = this.#process
    this.#process = undefined
    if (!server?.running) return
    server.signal(signal)
    await server.exited
  }

  /** A pool on the socket. It is ended by `close`. */
  pool(options: PoolConfig = {}): Pool {
    const pool = new Pool({ ...this.#address, ...options })
    this.#pools.add(pool)
    // Without a listener the loss of an idle connection would end the process.
    pool.on('error', () => {})
    return pool
  }

  get #address(): PoolConfig {
    return { host: this.host, user: this.user, database: this.database }
  }

  /** Ends the pools and the server, and removes its folder. */
  async close(): Promise<void> {
    for (const pool of this.#pools) if (!pool.ended) pool.end().catch(() => {})
    await this.#end('SIGQUIT')
    await rm(this.host, { recursive: true, force: true })
  }

  /**
   * Every statement that the server received while `fn` ran, whoever sent it. Several in one message are one, as
   * they are one round trip.
   */
  async statements<T>(fn: () => T | Promise<T>): Promise<{ result: T; sent: string[] }> {
    const mark = async () => {
      const word = `mark ${randomUUID()}`
      const pool = new Pool({ ...this.#address, max: 1 })
      await pool.query(`SELECT '${word}'`)
      await pool.end()
      return word
    }
    const first = await mark()
    const result = await fn()
    const last = await mark()
    const log = readFileSync(this.#log, 'utf8')
    const between = log.slice(log.indexOf(first), log.lastIndexOf('\n', log.indexOf(last)))
    // A statement of several lines goes on behind a tab.
    const lines = between.replaceAll('\n\t', '\n ').split(/\n(?=\d+ )/)
    const sent = lines.flatMap(
      (line) => /^\d+ LOG: {2}(?:statement|execute \S+): ([\s\S]*)/.exec(line)?.[1]?.trim() ?? []
    )
    return { result, sent: sent.filter((statement) => !statement.startsWith("SELECT 'mark ")) }
  }
}

/** PostgreSQL does not run as root: then it gets another user, and a folder of that user's. */
function asOrdinaryUser(program: string, folder: string): [file: string, args: string[]] {
  if (process.getuid?.() !== 0) return [program, []]
  const id = (option: string) => {
    for (const user of ['postgres', 'nobody']) {
      try {
        return Number(execFileSync('id', [option, user], { encoding: 'utf8', stdio: 'pipe' }))
      } catch {}
    }
    throw new Error('There is no user that PostgreSQL could run as')
  }
  const [uid, gid] = [id('-u'), id('-g')]
  chmodSync(dirname(folder), 0o711)
  chownSync(folder, uid, gid)
  return ['setpriv', [`--reuid=${uid}`, `--regid=${gid}`, '--clear-groups', program]]
}
