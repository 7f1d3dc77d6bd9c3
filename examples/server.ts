import { subscribe } from 'node:diagnostics_channel'
import type { IdempotencyEvent } from '../index.js'
import { buildApp } from './app.js'
import { linesToPaste, readSettings } from './settings.js'

/* The payments API in one process, without the demo around it. */

const { PORT = '3000', HOST = '127.0.0.1' } = process.env
const settings = readSettings()
const app = await buildApp(settings)
const url = await app.listen({ host: HOST, port: Number(PORT) })

console.log(`A payments API, its keys ${settings.place}. Paste these into another terminal:
${linesToPaste(url, settings)}`)

// What an order does, and what it need not do again.
for (const event of ['step-stored', 'step-resumed']) {
  subscribe(`fastify-idempotency:${event}`, (message) => console.log(`${event} ${(message as IdempotencyEvent).step}`))
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void app.close())
}
