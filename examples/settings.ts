import { randomUUID } from 'node:crypto'
import type { Services } from './app.js'
import { canOpenFiles } from './databases.js'

/** What the environment says: where keys are kept, and in words. */
export interface Settings extends Services {
  place: string
  /** Does the store live on when the process dies? */
  survives: boolean
}

const FILE = 'example.sqlite'

/** `DATABASE_URL`, else `REDIS_URL`, else a file of SQLite, else memory. */
export function readSettings(env: NodeJS.ProcessEnv = process.env): Settings {
  const { REDIS_URL: redisUrl, PARTNERS_URL: partnersUrl } = env
  const file = redisUrl === undefined && canOpenFiles() ? `sqlite:${FILE}` : undefined
  const { DATABASE_URL: databaseUrl = file } = env
  const services = { redisUrl, databaseUrl, partnersUrl }
  const [scheme = ''] = /^\w+/.exec(databaseUrl ?? redisUrl ?? 'memory') ?? []
  const place = {
    sqlite: `in the SQLite file ${databaseUrl?.slice('sqlite:'.length)}, where they survive a restart`,
    mysql: 'in MySQL',
    redis: 'in Redis',
    rediss: 'in Redis',
    memory: 'in memory: a restart forgets them'
  }[scheme]
  return { ...services, place: place ?? 'in PostgreSQL', survives: scheme !== 'memory' }
}

/** What to paste into another terminal. */
export function linesToPaste(url: string, { databaseUrl, survives }: Settings): string {
  const curl = (key: string, body: object) =>
    `curl -i ${url}/charges -H 'content-type: application/json' -H 'idempotency-key: ${key}' -d '${JSON.stringify(body)}'`
  const once = curl(randomUUID(), { amount: 4200, currency: 'EUR' })
  const slow = curl(randomUUID(), { amount: 100, currency: 'EUR', processingMs: 2000 })
  const keepsCharges = survives && databaseUrl !== undefined
  return `
# 1. The first request runs: 201
${once}

# 2. The same request again does not: the same 201, with idempotent-replayed: true
${once}

# 3. A duplicate while the first still runs: 409, with retry-after
${slow} -so /dev/null & sleep 0.5; ${slow}

# 4. Two charges were made, however often you paste: 4300 in all${keepsCharges ? ', for each time that this server was started' : ''}, and the sum of all entries is 0
curl -s ${url}/balance
${keepsCharges ? '# Kill this server in the middle of 3, start it again, repeat 3: still one charge for its key\n' : ''}
And a form that survives a double click: ${url}/form`
}
