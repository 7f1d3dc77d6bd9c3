import { randomUUID } from 'node:crypto'
import { connect } from 'node:net'

/**
 * Requests over keep-alive connections, one in flight on each. As little of a client as there can be, because it
 * shares the machine with the server: bytes that are made before, and replies that are looked at for their status and
 * length only.
 */
export class HttpLoad {
  #sockets = []

  static async connect(port, connections) {
    const load = new HttpLoad()
    for (let i = 0; i < connections; i++) load.#sockets.push(await new Connection(port).open())
    return load
  }

  /**
   * Sends the requests, so many at a time, and rejects when one is not answered by that status.
   * @returns How long each took, in microseconds.
   */
  async run(requests, status, inFlight = this.#sockets.length) {
    const latencies = []
    let at = 0
    await Promise.all(
      this.#sockets.slice(0, inFlight).map(async (socket) => {
        while (at < requests.length) {
          const sent = performance.now()
          const got = await socket.exchange(requests[at++])
          latencies.push((performance.now() - sent) * 1_000)
          if (got !== status) throw new Error(`Got ${got}, wanted ${status}`)
        }
      })
    )
    return latencies
  }

  close() {
    for (const socket of this.#sockets) socket.close()
  }
}

class Connection {
  #socket
  #received = []
  #missing = 0
  #status = 0
  #resolve
  #reject

  constructor(port) {
    this.#socket = connect({ port, host: '127.0.0.1', noDelay: true })
    this.#socket.on('data', this.#take)
    this.#socket.on('error', (error) => this.#reject?.(error))
    this.#socket.on('close', () => this.#reject?.(new Error('The server closed the connection')))
  }

  open() {
    return new Promise((resolve, reject) => {
      this.#reject = reject
      this.#socket.once('connect', () => resolve(this))
    })
  }

  exchange(bytes) {
    return new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
      this.#missing = -1
      this.#socket.write(bytes)
    })
  }

  close() {
    this.#reject = undefined
    this.#socket.destroy()
  }

  #take = (chunk) => {
    if (this.#missing < 0) {
      this.#received.push(chunk)
      const bytes = this.#received.length === 1 ? chunk : Buffer.concat(this.#received)
      const end = bytes.indexOf('\r\n\r\n')
      if (end < 0) return
      const head = bytes.latin1Slice(0, end)
      this.#status = Number(head.slice(9, 12))
      this.#missing = Number(/content-length: *(\d+)/i.exec(head)?.[1]) - (bytes.length - end - 4)
      this.#received = []
    } else {
      this.#missing -= chunk.length
    }
    if (this.#missing === 0) this.#resolve(this.#status)
  }
}

/** A request as bytes. */
export function bytesOf(path, body, key) {
  const keyLine = key === undefined ? '' : `idempotency-key: ${key}\r\n`
  const head = `POST ${path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n${keyLine}`
  return Buffer.from(`${head}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`)
}

/** So many requests of a path, made before the clock starts. */
export function requestsOf(path, count, url, body, keys) {
  if (path === 'replay') return Array.from({ length: count }, (_, i) => bytesOf(url, body, keys[i % keys.length]))
  return Array.from({ length: count }, () => bytesOf(url, body, path === 'first' ? randomUUID() : undefined))
}
