import { randomUUID } from 'node:crypto'
import { readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
// In a project of your own: import { … } from 'fastify-idempotency/client'
import { type IdempotentFetch, IdempotentFetchError, idempotentFetch } from '../lib/client.js'

/** What became of one entry. Without a status it is not known, and the entry stays. */
export interface Sent {
  key: string
  status: number | null
}

/**
 * Notes what is to be sent, under a new key: before the first attempt, so that a crash forgets neither.
 * @returns the key
 */
export async function enqueue(folder: string, body: unknown): Promise<string> {
  const key = randomUUID()
  // All of it or nothing: what is half written has another name.
  await writeFile(join(folder, `${key}.tmp`), JSON.stringify(body), { flush: true })
  await rename(join(folder, `${key}.tmp`), join(folder, `${key}.json`))
  return key
}

/** Sends what is there, each with its own key, however often it takes: now, and whenever this is called again. */
export async function drain(folder: string, url: string, send: IdempotentFetch = idempotentFetch()): Promise<Sent[]> {
  const sent: Sent[] = []
  for (const file of (await readdir(folder)).filter((name) => name.endsWith('.json'))) {
    const key = file.slice(0, -'.json'.length)
    const status = await attempt(send, url, key, await readFile(join(folder, file), 'utf8'))
    if (status !== null) await rm(join(folder, file))
    sent.push({ key, status })
  }
  return sent
}

/** The status of the answer; `null` when there is none yet. */
async function attempt(send: IdempotentFetch, url: string, key: string, body: string): Promise<number | null> {
  try {
    const headers = { 'content-type': 'application/json' }
    const { status } = await send(url, { method: 'POST', headers, body, idempotencyKey: key })
    // Not final: what asks to come later. A 409 that does not go away is for somebody to look at.
    return status < 500 && ![408, 409, 425, 429].includes(status) ? status : null
  } catch (error) {
    if (error instanceof IdempotentFetchError) return null
    throw error
  }
}
