import { connect, createServer, type Server } from 'node:net'
import { join } from 'node:path'
import type { CommitLoss } from './orm-scenes.js'
import { makeFolder } from './process.js'

/** A bad network in front of a server of MySQL's protocol, where a client waits for the answer to each statement. */
export class CommitProxy {
  /** The path of its unix socket. */
  readonly socket = join(makeFolder('commits'), 'socket')
  /** What becomes of the next commit. */
  next: CommitLoss | null = null
  readonly #server: Server

  private constructor(target: string) {
    this.#server = createServer((client) => {
      const server = connect(target)
      const cut = () => {
        client.destroy()
        // What was written last still goes out.
        server.destroySoon()
      }
      let unheard = false
      for (const socket of [client, server]) socket.on('error', () => {}).on('close', cut)
      client.on('data', (chunk) => {
        const loss = /\bcommit\b/i.test(chunk.toString('latin1')) ? this.next : null
        if (loss !== null) this.next = null
        unheard = loss === 'unheard'
        if (loss !== 'unsent') server.write(chunk)
        if (loss === 'unsent' || loss === 'cut') cut()
      })
      server.on('data', (chunk) => (unheard ? cut() : client.write(chunk)))
    })
  }

  static async start(target: string): Promise<CommitProxy> {
    const proxy = new CommitProxy(target)
    await new Promise<void>((resolve) => proxy.#server.listen(proxy.socket, resolve))
    return proxy
  }

  /** Once its clients have closed their connections. */
  close(): Promise<unknown> {
    return new Promise((resolve) => this.#server.close(resolve))
  }
}
