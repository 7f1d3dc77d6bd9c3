import { mkdtempSync, rmSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/**
 * A socket before a server's socket that counts what passes. A round trip is a turn of the conversation: the client
 * speaks after the server has, or first. So it counts the same for every client library.
 */
export async function countingProxy(target, name) {
  const folder = mkdtempSync(join(tmpdir(), 'wire-'))
  const path = join(folder, name)
  const seen = { trips: 0, sent: 0, received: 0 }
  const sockets = new Set()
  const proxy = createServer((client) => {
    const server = connect(target)
    let clientSpoke = false
    for (const socket of [client, server]) {
      sockets.add(socket)
      socket.on('error', () => {})
      socket.on('close', () => {
        sockets.delete(socket)
        client.destroy()
        server.destroy()
      })
    }
    client.on('data', (chunk) => {
      if (!clientSpoke) seen.trips++
      clientSpoke = true
      seen.sent += chunk.length
      server.write(chunk)
    })
    server.on('data', (chunk) => {
      clientSpoke = false
      seen.received += chunk.length
      client.write(chunk)
    })
  })
  await new Promise((resolve) => proxy.listen(path, resolve))
  return {
    path,
    folder,
    seen: () => ({ ...seen }),
    close() {
      proxy.close()
      for (const socket of sockets) socket.destroy()
      rmSync(folder, { recursive: true, force: true })
    }
  }
}
