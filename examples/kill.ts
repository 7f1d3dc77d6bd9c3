// Orders one book from the example's server, which is killed after each of its steps and started again, and counts what came of it:
//
//   npm run kill
//
// The orders are in a file of SQLite, or in the database of DATABASE_URL.

import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import Fastify from 'fastify'
import idempotency from '../index.js'

const folder = await mkdtemp(join(tmpdir(), 'example-'))
const { DATABASE_URL = `sqlite:${join(folder, 'orders')}` } = process.env

/** What stands for the services that the shop calls: they know keys, and count what they do. */
const done: Record<string, number> = { payments: 0, mails: 0 }
const partners = Fastify()
await partners.register(idempotency, { onConflict: 'wait' })
for (const what of ['payments', 'mails']) {
  partners.post(`/${what}`, { config: { idempotency: { required: true } } }, async () => {
    await sleep(200)
    done[what] = (done[what] ?? 0) + 1
    return {}
  })
}
const partnersUrl = await partners.listen({ host: '127.0.0.1', port: 0 })

/** How many orders the shop's page shows. */
const count = async (url: string) => (await (await fetch(`${url}/form`)).text()).split('<li>').length - 1

/** Each server listens where the first one did: another host or port would be another service. */
let port = '0'

/** Starts the server, and kills it when it has stored this step. Gives its URL. */
async function serve(killedAfter: string | null): Promise<{ url: string; end: Promise<unknown>; kill(): void }> {
  const env = { ...process.env, DATABASE_URL, PORT: port, PARTNERS_URL: partnersUrl }
  const server = spawn(process.execPath, [fileURLToPath(new URL('server.js', import.meta.url))], { env })
  const end = once(server, 'exit')
  server.stderr.pipe(process.stderr)
  const lines = createInterface(server.stdout)
  const url = new Promise<string>((resolve) => {
    lines.on('line', (line) => {
      if (line.startsWith('step')) console.log(`  ${line}`)
      if (line === `step-stored ${killedAfter}`) server.kill('SIGKILL')
      const [, at] = /double click: (\S+)\/form/.exec(line) ?? []
      if (at !== undefined) resolve(at)
    })
  })
  port = new URL(await url).port
  return { url: await url, end, kill: () => server.kill() }
}

const key = randomUUID()
const order = (url: string) =>
  fetch(`${url}/orders`, {
    method: 'POST',
    redirect: 'manual',
    headers: { 'content-type': 'application/json', 'x-idempotent-key': key },
    body: JSON.stringify({ title: 'Release It!' })
  })

/** The answer of a server, after its 409s of while the lease of the dead one lasts; none when it is killed before. */
async function answerOf(url: string): Promise<number | undefined> {
  for (;;) {
    const reply = await order(url).catch(() => null)
    if (reply?.status !== 409) return reply?.status
    await sleep(200)
  }
}

let before = 0
let orders = 0
for (const step of ['order', 'payment', 'mail', null]) {
  console.log(step === null ? 'A server that lives:' : `A server that is killed after the step "${step}":`)
  const server = await serve(step)
  if (step === 'order') before = await count(server.url)
  const status = await answerOf(server.url)
  // A server that answers before it is killed may not live to show its page.
  const after = status === undefined ? null : await count(server.url).catch(() => null)
  server.kill()
  await server.end
  if (after === null) continue
  orders = after - before
  console.log(`Answered with ${status}`)
  break
}

console.log(`${orders} order, ${done.payments} payment, ${done.mails} mail`)
await partners.close()
await rm(folder, { recursive: true })
process.exitCode = orders === 1 && done.payments === 1 && done.mails === 1 ? 0 : 1
