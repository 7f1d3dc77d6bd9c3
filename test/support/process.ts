import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync } from 'node:fs'
import { createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { until } from './latch.js'

// Server processes that never outlive the test process. Whatever ends that one, be it SIGKILL, closes the pipe to the
// reaper, which then kills what is still on its list, paused processes as well, and removes their folders.

const living = new Set<ChildProcess>()
let reaper: { folder: string; pipe: Socket } | undefined

// Each line is the whole list, so the last one is what is left. Their own children may write for a moment longer.
const reap = `
  while read -r pids; do left=$pids; done
  if [ -n "$left" ]; then kill -KILL $left; fi
  rm -rf "$1"
  sleep 2
  rm -rf "$1"
`

function hireReaper(): NonNullable<typeof reaper> {
  const folder = mkdtempSync(join(tmpdir(), 'servers-'))
  // A session of its own: Ctrl-C in the terminal must not reach it.
  const shell = spawn('/bin/sh', ['-c', reap, 'reaper', folder], {
    detached: true,
    stdio: ['pipe', 'ignore', 'ignore']
  })
  shell.unref()
  const pipe = shell.stdin as Socket
  pipe.unref()
  pipe.on('error', () => {})
  process.on('exit', () => {
    for (const child of living) child.kill('SIGKILL')
  })
  return { folder, pipe }
}

function updateReaper(): void {
  reaper ??= hireReaper()
  reaper.pipe.write(`${Array.from(living, ({ pid }) => pid).join(' ')}\n`)
}

export interface ServerProcess {
  readonly pid: number
  readonly exited: Promise<void>
  readonly running: boolean
  /** Its file descriptors from 3 on. */
  readonly pipes: readonly Socket[]
  /** All that it printed. */
  output(): string
  signal(signal: NodeJS.Signals): void
  /** Stopped in its tracks when this resolves: connections stay open and nothing answers. */
  pause(): Promise<void>
  resume(): void
}

export interface LaunchOptions {
  /** On top of this process's environment. */
  env?: Record<string, string>
  /** The file that takes what it prints. */
  log: string
  /** How many pipes it gets besides. They keep the event loop alive. */
  pipes?: number
}

/** Starts a server process. It does not keep the event loop alive. */
export async function launch(
  command: string,
  args: string[],
  { env, log, pipes = 0 }: LaunchOptions
): Promise<ServerProcess> {
  const out = openSync(log, 'w')
  const child: ChildProcess = spawn(command, args, {
    env: { ...process.env, LC_ALL: 'C', ...env },
    stdio: ['ignore', out, out, ...Array<'pipe'>(pipes).fill('pipe')]
  })
  closeSync(out)
  child.unref()
  const { pid } = child
  if (pid === undefined) throw await new Promise((resolve) => child.once('error', resolve))

  living.add(child)
  updateReaper()
  let running = true
  const exited = new Promise<void>((resolve) => {
    child.once('exit', () => {
      running = false
      living.delete(child)
      updateReaper()
      resolve()
    })
  })
  return {
    pid,
    pipes: child.stdio.slice(3) as unknown as Socket[],
    get running() {
      return running
    },
    // What waits for the exit keeps the event loop alive meanwhile.
    get exited() {
      if (running) child.ref()
      return exited
    },
    output: () => readFileSync(log, 'utf8'),
    signal: (signal) => void child.kill(signal),
    async pause() {
      child.kill('SIGSTOP')
      // A signal arrives a moment after it was sent.
      if (process.platform === 'linux')
        await until(() => state(pid) !== 'running', { message: `process ${pid} to stop` })
    },
    resume: () => void child.kill('SIGCONT')
  }
}

/** Where there is no /proc to read, a paused process counts as running, and so does one that nobody waited for. */
export function state(pid: number): 'running' | 'paused' | 'gone' {
  try {
    process.kill(pid, 0)
    if (process.platform !== 'linux') return 'running'
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1')
    const letter = stat.charAt(stat.lastIndexOf(')') + 2)
    if (letter === 'Z' || letter === 'X') return 'gone'
    return letter === 'T' ? 'paused' : 'running'
  } catch {
    return 'gone'
  }
}

/** A new folder, with a path that is short enough for a socket. It goes with the test process at the latest. */
export function makeFolder(prefix: string): string {
  reaper ??= hireReaper()
  return mkdtempSync(join(reaper.folder, `${prefix}-`))
}

/**
 * A loopback port that is free now, and so is the port 10,000 above, for the bus of a Redis Cluster. Both are below the
 * range that outgoing connections take theirs from, so that a server that was stopped finds its port again.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 11_000 + Math.floor(Math.random() * 10_000)
    if ((await isFree(port)) && (await isFree(port + 10_000))) return port
  }
}

function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer()
    server.once('error', () => resolve(false))
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)))
  })
}
