import { EventEmitter } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import type { StoreUnderTest } from '../../lib/testkit.js'
import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  ListedKey,
  ListedKind,
  Settlement,
  StoredRecord,
  StoredReply,
  StoredStep
} from '../../types/index.js'
import { type Found, ModelData, ModelStore, type Row } from './model-store.js'

// Stores that are wrong in one thing each, as people have got it wrong.

type Step = 'renew' | 'step' | 'complete' | 'release'
type How = 'completed' | 'released' | 'deleted'

type Model = new (data: ModelData) => ModelStore

/** Two clients on the same data, of a class of stores. */
function clients(Store: Model): () => StoreUnderTest {
  return () => {
    const data = new ModelData()
    const store = new Store(data)
    return { store, second: new Store(data), spoil: (key) => store.spoil(key) }
  }
}

/** The model, with some of its answers changed. */
function answering(change: (answer: Acquisition) => object): Model {
  return class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      return change(await super.acquire(key, claim)) as Acquisition
    }
    override async get(key: string) {
      const found = await super.get(key)
      return found && (change(found) as Acquisition)
    }
  }
}

/** The model, with the steps of its answers changed. */
function stepping(change: (steps: StoredStep[]) => StoredStep[]): Model {
  return class extends ModelStore {
    protected override stepsOf(row: Row) {
      const { steps } = super.stepsOf(row)
      return steps === undefined ? {} : { steps: change(steps) }
    }
  }
}

/** The model, with the members of a reply changed on their way into the table or out of it. */
function keeping(change: (reply: StoredReply) => object, on: 'in' | 'out' = 'out'): Model {
  const changed = (record: StoredRecord) =>
    (record.kind === 'reply' ? { ...record, ...change(record) } : record) as StoredRecord
  return class extends ModelStore {
    protected override encode(record: StoredRecord) {
      return super.encode(on === 'in' ? changed(record) : record)
    }
    protected override decode(text: string) {
      const record = super.decode(text)
      return on === 'out' ? changed(record) : record
    }
  }
}

/** The model, with records that are kept as objects. */
function referring(keep: (record: StoredRecord) => StoredRecord, give: (record: StoredRecord) => StoredRecord): Model {
  const records = new Map<string, StoredRecord>()
  return class extends ModelStore {
    protected override encode(record: StoredRecord) {
      const name = `record ${records.size}!`
      records.set(name, keep(record))
      return name
    }
    protected override decode(name: string) {
      const record = records.get(name)
      if (record === undefined) throw new Error('No such record')
      return give(record)
    }
  }
}

function copy(record: StoredRecord): StoredRecord {
  return record.kind === 'reply'
    ? { ...record, headers: structuredClone(record.headers), body: Buffer.from(record.body) }
    : { ...record }
}

/** The model, with another name for a key in the table. */
function naming(rowKey: (key: string) => string): Model {
  return class extends ModelStore {
    protected override rowKey(key: string) {
      return rowKey(key)
    }
  }
}

/** The model, with what a step decides made before the step itself, and not in one. */
function hesitating(late: 'acquire' | Step): Model {
  return class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      if (late !== 'acquire') return super.acquire(key, claim)
      const now = this.now()
      const row = this.known(key, now)
      await sleep(1)
      if (row === undefined || row.state === 'released') return this.take(key, claim, 1, now)
      if (row.state === 'running' && row.token !== claim.token && row.leaseEnd <= now && claim.takeover) {
        return this.take(key, claim, row.attempt + 1, now, this.found(row))
      }
      return super.acquire(key, claim)
    }
    override renew(key: string, token: string, leaseMs: number) {
      return this.#late('renew', key, token, () => super.renew(key, token, leaseMs))
    }
    override complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
      return this.#late('complete', key, token, () => super.complete(key, token, record, ttlMs))
    }
    override release(key: string, token: string, unused?: boolean) {
      return this.#late('release', key, token, () => super.release(key, token, unused))
    }
    async #late(step: Step, key: string, token: string, go: () => Promise<boolean>) {
      const row = this.known(key, this.now())
      if (step !== late || row?.state !== 'running' || row.token !== token) return go()
      await sleep(1)
      // As it was when it was looked at.
      this.data.rows.set(this.rowKey(key), { ...row, state: 'running', token })
      return go()
    }
  }
}

const never = new Promise<never>(() => {})
const looker: Claim = { token: 'looker', fingerprint: '', leaseMs: 60_000, retainMs: 60_000, takeover: true }

/** The model, with other times for a claim, or for one that is renewed. */
function prolonging(then: (row: Row, now: number, leaseMs: number) => void): Model {
  return class extends ModelStore {
    protected override prolong(row: Row, leaseMs: number, now: number) {
      super.prolong(row, leaseMs, now)
      then(row, now, leaseMs)
    }
  }
}

/** The model, with something else remembered of what was given back. */
function givingBack(then: (row: Row, now: number, before: Row) => void): Model {
  return class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      const before = { ...row }
      super.giveBack(row, found, unused, now)
      then(row, now, before)
    }
  }
}

/** The model, with a list that says something else of a key. */
function listing(change: (found: ListedKey) => object | null): Model {
  return class extends ModelStore {
    protected override listed(key: string, now: number) {
      const found = super.listed(key, now)
      return found && (change(found) as ListedKey | null)
    }
  }
}

/** The model, with another row, or another claim, when an owner claims again what it has. */
function repeating(first: (row: Row) => Partial<Claim>): Model {
  return class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      const row = this.known(key, this.now())
      const isRepeated = row?.state === 'running' && row.token === claim.token
      return super.acquire(key, isRepeated ? { ...claim, ...first(row) } : claim)
    }
  }
}

const models: Record<string, Model> = {
  'looks first and claims later': hesitating('acquire'),
  'looks first and renews later': hesitating('renew'),
  'looks first and completes later': hesitating('complete'),
  'looks first and releases later': hesitating('release'),
  ...Object.fromEntries(
    (['renew', 'complete', 'release'] as const).map((wrong) => [
      `asks nobody for a token to ${wrong}`,
      class extends ModelStore {
        protected override owns(step: Step, row: Row, token: string, now: number) {
          return step === wrong || super.owns(step, row, token, now)
        }
      }
    ])
  ),

  'takes a lapsed claim from its owner': class extends ModelStore {
    protected override owns(step: Step, row: Row, token: string, now: number) {
      return super.owns(step, row, token, now) && (row.state !== 'running' || row.leaseEnd > now)
    }
  },
  'forgets who has completed': class extends ModelStore {
    protected override again(step: Step) {
      return step !== 'complete'
    }
  },
  'forgets who has released': class extends ModelStore {
    protected override again(step: Step) {
      return step !== 'release'
    }
  },
  'overwrites a record with a later one': class extends ModelStore {
    override async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
      const row = this.known(key, this.now())
      if (row?.state === 'completed' && row.token === token) row.state = 'running'
      return super.complete(key, token, record, ttlMs)
    }
  },
  'releases what is completed': class extends ModelStore {
    override async release(key: string, token: string, unused?: boolean) {
      const row = this.known(key, this.now())
      if (row?.state === 'completed' && row.token === token) row.state = 'running'
      return super.release(key, token, unused)
    }
  },

  'expires for those who read, and not for those who claim': class extends ModelStore {
    #claiming = false
    override acquire(key: string, claim: Claim) {
      this.#claiming = true
      const found = super.acquire(key, claim)
      this.#claiming = false
      return found
    }
    protected override known(key: string, now: number) {
      return this.#claiming ? this.data.rows.get(key) : super.known(key, now)
    }
    protected override completed(row: Row, now: number) {
      return super.completed({ ...row, expires: Math.max(row.expires, now) }, now)
    }
  },
  'never expires': class extends ModelStore {
    protected override known(key: string) {
      return this.data.rows.get(key)
    }
    protected override completed(row: Row, now: number) {
      return super.completed({ ...row, expires: Math.max(row.expires, now) }, now)
    }
  },
  'forgets a claim with its lease': prolonging((row) => {
    row.expires = row.leaseEnd
  }),
  'remembers an abandoned claim for ever': prolonging((row) => {
    row.expires = Number.POSITIVE_INFINITY
  }),
  'remembers a renewed claim for no longer than before': class extends ModelStore {
    protected override prolong(row: Row, leaseMs: number, now: number) {
      const { expires } = row
      super.prolong(row, leaseMs, now)
      if (expires > 0) row.expires = expires
    }
  },
  'lets a lease lapse early': prolonging((row, now, leaseMs) => {
    row.leaseEnd = now + leaseMs / 2
  }),
  'lets a lease of 40 days overflow': class extends ModelStore {
    protected override prolong(row: Row, leaseMs: number, now: number) {
      super.prolong(row, leaseMs < 2 ** 31 ? leaseMs : 1, now)
    }
  },
  'renews for as long as it was claimed': class extends ModelStore {
    readonly #first = new WeakMap<Row, number>()
    protected override prolong(row: Row, leaseMs: number, now: number) {
      const first = this.#first.get(row) ?? leaseMs
      this.#first.set(row, first)
      super.prolong(row, first, now)
    }
  },

  'does not count attempts': class extends ModelStore {
    protected override nextAttempt(row: Row) {
      return row.attempt
    }
  },
  'counts attempts over a release and an expiry': class extends ModelStore {
    protected override take(key: string, claim: Claim, _: number, now: number, found?: Found) {
      return super.take(key, claim, (this.data.rows.get(key)?.attempt ?? 0) + 1, now, found)
    }
  },
  'forgets an interrupted attempt with the release of a later one': class extends ModelStore {
    protected override giveBack(row: Row, _found: Found | null, _unused: boolean, now: number) {
      Object.assign(row, { state: 'released', expires: now + 60_000 })
    }
  },
  'remembers the release of a first attempt': class extends ModelStore {
    protected override take(key: string, claim: Claim, attempt: number, now: number, found?: Found) {
      return super.take(key, claim, attempt, now, found ?? { state: 'abandoned', fingerprint: '', steps: [] })
    }
  },
  'gives a claim back with its lease': givingBack((row, _now, { leaseEnd }) => {
    row.leaseEnd = leaseEnd
  }),
  'remembers what was given back for ever': givingBack((row) => {
    row.expires = Number.POSITIVE_INFINITY
  }),
  'remembers what was given back for as long as a release': givingBack((row, now) => {
    row.expires = now + 10
  }),
  'does not say that a claim has ended': answering(({ ...found }) => {
    if (found.state === 'abandoned') delete found.ended
    return found
  }),
  'says of all that is abandoned that it has ended': answering((found) =>
    found.state === 'abandoned' ? { ...found, ended: true } : found
  ),
  'says whether a claim has ended by true or false': answering((found) =>
    found.state === 'abandoned' ? { ...found, ended: found.ended ?? false } : found
  ),
  'counts attempts whose handler never ran': class extends ModelStore {
    override release(key: string, token: string) {
      return super.release(key, token)
    }
  },
  'takes back every attempt that is released': class extends ModelStore {
    override release(key: string, token: string) {
      return super.release(key, token, true)
    }
  },
  'says that what was taken over and given back unused has ended': class extends ModelStore {
    protected override found(row: Row): Found {
      return { ...super.found(row), state: 'ended' }
    }
  },
  'forgets that what was taken over and given back unused had ended': class extends ModelStore {
    protected override found(row: Row): Found {
      return { ...super.found(row), state: 'abandoned' }
    }
  },
  'keeps the fingerprint of a claim that was given back unused': class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      super.giveBack(row, found && { ...found, fingerprint: row.fingerprint }, unused, now)
    }
  },
  'leaves what was given back to its former owner': class extends ModelStore {
    override async renew(key: string, token: string, leaseMs: number) {
      this.#undo(key, token)
      return super.renew(key, token, leaseMs)
    }
    override async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
      this.#undo(key, token)
      return super.complete(key, token, record, ttlMs)
    }
    #undo(key: string, token: string) {
      const row = this.known(key, this.now())
      if (row?.token === token && (row.state === 'ended' || row.state === 'abandoned')) row.state = 'running'
    }
  },
  'knows who has given a claim back for its owner': class extends ModelStore {
    override async acquire(key: string, claim: Claim): Promise<Acquisition> {
      const row = this.known(key, this.now())
      if (row?.state === 'ended' && row.token === claim.token) return { state: 'acquired', attempt: row.attempt }
      return super.acquire(key, claim)
    }
  },
  'gives back again what was given back': class extends ModelStore {
    override async release(key: string, token: string, unused = false) {
      const now = this.now()
      const row = this.known(key, now)
      if (row?.token === token && row.state === 'ended') row.attempt--
      return super.release(key, token, unused)
    }
  },

  'forgets what it took over when a claim is repeated': repeating((row) => {
    row.found = null
    return {}
  }),
  'remembers a repeated claim for no longer than before': repeating(({ retainMs }) => ({ retainMs })),
  'remembers what there is no need to remember': class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      return super.acquire(key, { ...claim, retainMs: Math.max(claim.retainMs, 1) * 1_000 })
    }
  },
  'keeps the fingerprint of a claim that is repeated': repeating(({ fingerprint }) => ({ fingerprint })),
  'counts the repeated claim as another attempt': repeating((row) => {
    row.attempt++
    return {}
  }),
  'does not know its owner again': class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      const now = this.now()
      const row = this.known(key, now)
      return row?.state === 'running' && row.token === claim.token ? this.held(row, now) : super.acquire(key, claim)
    }
  },
  'gives a completed key to its owner': class extends ModelStore {
    override async acquire(key: string, claim: Claim): Promise<Acquisition> {
      const row = this.known(key, this.now())
      if (row?.state === 'completed' && row.token === claim.token) return { state: 'acquired', attempt: row.attempt }
      return super.acquire(key, claim)
    }
  },

  'takes over without being asked': class extends ModelStore {
    protected override mayTakeOver() {
      return true
    }
  },
  'looks at the clock twice': class extends ModelStore {
    protected override held(row: Row, now: number) {
      return super.held(row, now + 2)
    }
  },
  'never takes over': class extends ModelStore {
    protected override mayTakeOver() {
      return false
    }
  },

  'counts the ttl from the claim': class extends ModelStore {
    readonly #claimed = new WeakMap<Row, number>()
    protected override prolong(row: Row, leaseMs: number, now: number) {
      if (!this.#claimed.has(row)) this.#claimed.set(row, now)
      super.prolong(row, leaseMs, now)
    }
    protected override expires(row: Row, ttlMs: number | null, now: number) {
      return super.expires(row, ttlMs, this.#claimed.get(row) ?? now)
    }
  },
  'lets a ttl of 40 days overflow': class extends ModelStore {
    protected override expires(row: Row, ttlMs: number | null, now: number) {
      return super.expires(row, ttlMs === null || ttlMs < 2 ** 31 ? ttlMs : 1, now)
    }
  },
  'takes no ttl for none': class extends ModelStore {
    protected override expires(row: Row, ttlMs: number | null, now: number) {
      return super.expires(row, ttlMs ?? 0, now)
    }
  },
  'keeps a record for no longer than its claim': class extends ModelStore {
    protected override expires(row: Row, ttlMs: number | null, now: number) {
      return Math.min(row.expires, super.expires(row, ttlMs, now))
    }
  },
  'begins the ttl anew with a replay': class extends ModelStore {
    readonly #ttls = new WeakMap<Row, number>()
    protected override expires(row: Row, ttlMs: number | null, now: number) {
      if (ttlMs !== null) this.#ttls.set(row, ttlMs)
      return super.expires(row, ttlMs, now)
    }
    override async acquire(key: string, claim: Claim) {
      const found = await super.acquire(key, claim)
      const row = this.data.rows.get(key)
      const ttlMs = row && this.#ttls.get(row)
      if (row?.state === 'completed' && ttlMs !== undefined) row.expires = this.now() + ttlMs
      return found
    }
  },
  'tells the ttl as it was': answering((found) => (found.state === 'completed' ? { ...found, ttlMs: 60_000 } : found)),
  'tells no ttl as infinity': answering((found) =>
    found.state === 'completed' ? { ...found, ttlMs: found.ttlMs ?? Number.POSITIVE_INFINITY } : found
  ),
  'tells numbers as text': answering((found) => ({
    ...found,
    ...('attempt' in found && { attempt: String(found.attempt) })
  })),

  'keeps the record that it was given': referring((record) => record, copy),
  'gives the record that it keeps': referring(copy, (record) => record),
  'keeps the headers that it was given': referring(
    (record) =>
      (record.kind === 'reply' ? { ...copy(record), headers: [...record.headers] } : copy(record)) as StoredRecord,
    copy
  ),
  'keeps the body that it was given': referring(
    (record) => (record.kind === 'reply' ? { ...copy(record), body: record.body } : copy(record)) as StoredRecord,
    copy
  ),
  'gives the body that it keeps': referring(copy, (record) =>
    record.kind === 'reply' ? ({ ...copy(record), body: record.body } as StoredRecord) : copy(record)
  ),
  'reads a claim later than it was given': class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      await null
      return super.acquire(key, claim)
    }
  },

  'hears late': class extends ModelStore {
    protected override async listen(key: string, signal: AbortSignal) {
      await sleep(5)
      return super.listen(key, signal)
    }
  },
  'wakes nobody': class extends ModelStore {
    protected override ended() {}
  },
  'wakes one of several': class extends ModelStore {
    protected override ended(key: string) {
      this.data.ended.listeners(this.channel(key))[0]?.()
    }
  },
  'wakes those of its own client': class extends ModelStore {
    constructor(data: ModelData) {
      super(Object.assign(Object.create(data), { ended: new EventEmitter().setMaxListeners(0) }))
    }
  },
  'wakes those who listen to any key': class extends ModelStore {
    protected override channel() {
      return 'any'
    }
  },
  ...Object.fromEntries(
    (['completed', 'released', 'deleted'] as const).map((silent) => [
      `wakes nobody when a key is ${silent}`,
      class extends ModelStore {
        protected override ended(key: string, how: How) {
          if (how !== silent) super.ended(key, how)
        }
      }
    ])
  ),
  'wakes nobody when a claim is given back that took over': class extends ModelStore {
    protected override ended(key: string, how: How) {
      const row = this.data.rows.get(this.rowKey(key))
      if (row?.state !== 'ended' && row?.state !== 'abandoned') super.ended(key, how)
    }
  },
  'wakes before it writes': class extends ModelStore {
    override async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
      const row = this.known(key, this.now())
      if (row?.state === 'running' && row.token === token) {
        super.ended(key, 'completed')
        await sleep(5)
      }
      return super.complete(key, token, record, ttlMs)
    }
    protected override ended(key: string, how: How) {
      if (how !== 'completed') super.ended(key, how)
    }
  },
  'wakes with every claim and renewal': class extends ModelStore {
    protected override prolong(row: Row, leaseMs: number, now: number) {
      super.prolong(row, leaseMs, now)
      for (const name of this.data.ended.eventNames()) this.data.ended.emit(name)
    }
  },
  'listens where nothing runs': class extends ModelStore {
    override changed(key: string, signal: AbortSignal) {
      return signal.aborted ? Promise.resolve() : this.listen(key, signal)
    }
  },
  'listens to an abandoned claim': class extends ModelStore {
    override async changed(key: string, signal: AbortSignal) {
      const row = this.known(key, this.now())
      if (!signal.aborted && row !== undefined && 'running abandoned ended'.includes(row.state)) {
        await this.listen(key, signal)
      }
    }
  },
  'listens for ever': class extends ModelStore {
    protected override listen(key: string) {
      return super.listen(key, new AbortController().signal)
    }
  },
  'listens although it was called off before': class extends ModelStore {
    override changed(key: string, signal: AbortSignal) {
      return super.changed(key, signal.aborted ? new AbortController().signal : signal)
    }
  },
  'ends all listening with one': class extends ModelStore {
    protected override listen(key: string, signal: AbortSignal) {
      signal.addEventListener('abort', () => this.data.ended.emit(this.channel(key)))
      return super.listen(key, signal)
    }
  },

  'keeps bytes as text': keeping(({ body }) => ({ body: Buffer.from(body.toString('utf8')) }), 'in'),
  'keeps text as base64': keeping(({ body, text }) => (text ? { body: Buffer.from(body.toString('base64')) } : {})),
  'takes everything for text': keeping(() => ({ text: true })),
  'takes nothing for text': keeping(() => ({ text: false })),
  'does not say what is text': keeping(() => ({ text: undefined })),
  'loses an empty body': keeping(({ body }) => ({ body: body.length > 0 ? body : null })),
  'gives bodies that are no buffers': keeping(({ body }) => ({ body: new Uint8Array(body) })),
  'cuts a body at 64 KiB': keeping(({ body }) => ({ body: body.subarray(0, 65_535) })),
  'joins the values of a header': keeping(({ headers }) => ({
    headers: headers.map(([name, value]) => [name, String(value)])
  })),
  'keeps headers as an object': keeping(({ headers }) => ({ headers: Object.entries(Object.fromEntries(headers)) })),
  'makes a value of a single one': keeping(({ headers }) => ({
    headers: headers.map(([name, value]) => [name, Array.isArray(value) && value.length === 1 ? value[0] : value])
  })),
  'gives the time as a date': keeping(({ createdAt }) => ({ createdAt: new Date(createdAt) })),
  'loses tombstones': class extends ModelStore {
    protected override decode(text: string) {
      const record = super.decode(text)
      return {
        statusCode: 409,
        headers: [],
        body: Buffer.alloc(0),
        text: true,
        ...record,
        kind: 'reply'
      } as StoredReply
    }
  },
  'gives the fingerprint of the claim': class extends ModelStore {
    protected override completed(row: Row, now: number) {
      const found = super.completed(row, now)
      if (found.state === 'completed') found.record.fingerprint = row.fingerprint
      return found
    }
  },
  'takes what it cannot decode for nothing': class extends ModelStore {
    override acquire(key: string, claim: Claim) {
      return super.acquire(key, claim).catch(() => this.take(key, claim, 1, this.now()))
    }
    override get(key: string) {
      return super.get(key).catch(() => null)
    }
  },
  'gives what it cannot decode': class extends ModelStore {
    protected override decode(text: string) {
      try {
        return super.decode(text)
      } catch {
        return { kind: 'reply', fingerprint: '', createdAt: 0 } as StoredReply
      }
    }
  },

  'trims keys': naming((key) => key.trim()),
  'folds the case of keys': naming((key) => key.toLowerCase()),
  'normalises keys': naming((key) => key.normalize()),
  'cuts keys at 255 characters': naming((key) => key.slice(0, 255)),
  'ends keys at a NUL': naming((key) => key.split('\0')[0] as string),
  'keeps keys in an object': class extends ModelStore {
    protected override known(key: string, now: number) {
      return key in {} ? ({} as Row) : super.known(key, now)
    }
  },
  'refuses an empty key': class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      if (key === '') throw new RangeError('An empty key')
      return super.acquire(key, claim)
    }
  },
  'folds the case of tokens': class extends ModelStore {
    protected override owns(_: Step, row: Row, token: string) {
      return row.token.toLowerCase() === token.toLowerCase()
    }
  },
  'cuts tokens at 254 bytes': class extends ModelStore {
    protected override owns(_: Step, row: Row, token: string) {
      return row.token.slice(0, 254) === token.slice(0, 254)
    }
  },
  'trims fingerprints': answering((found) =>
    'fingerprint' in found ? { ...found, fingerprint: found.fingerprint.trim() } : found
  ),
  'cuts fingerprints at 255 characters': answering((found) =>
    'fingerprint' in found ? { ...found, fingerprint: found.fingerprint.slice(0, 255) } : found
  ),

  'claims what it looks at': class extends ModelStore {
    override async get(key: string) {
      const found = await super.get(key)
      if (found === null) this.take(key, { ...looker }, 1, this.now())
      return found
    }
  },
  'takes over what it looks at': class extends ModelStore {
    override async get(key: string) {
      const found = await super.get(key)
      if (found?.state === 'abandoned') await super.acquire(key, looker)
      return found
    }
  },
  'prolongs what it looks at': class extends ModelStore {
    override async get(key: string) {
      const row = this.known(key, this.now())
      if (row) row.expires = this.now() + 60_000
      return super.get(key)
    }
  },
  'shows what was released': class extends ModelStore {
    override async get(key: string) {
      const now = this.now()
      const row = this.known(key, now)
      return row?.state === 'released' ? this.held(row, now) : super.get(key)
    }
  },
  'shows nothing as undefined': class extends ModelStore {
    override async get(key: string) {
      return ((await super.get(key)) ?? undefined) as unknown as null
    }
  },
  'does not delete a record': class extends ModelStore {
    override async delete(key: string, unlessRunning?: boolean) {
      return this.known(key, this.now())?.state === 'completed' || super.delete(key, unlessRunning)
    }
  },
  'does not delete a running claim': class extends ModelStore {
    override async delete(key: string, unlessRunning?: boolean) {
      return this.known(key, this.now())?.state !== 'running' && super.delete(key, unlessRunning)
    }
  },
  'has always deleted something': class extends ModelStore {
    override async delete(key: string, unlessRunning?: boolean) {
      await super.delete(key, unlessRunning)
      return true
    }
  },
  'deletes everything': class extends ModelStore {
    override async delete(key: string, unlessRunning?: boolean) {
      const existed = await super.delete(key, unlessRunning)
      if (existed) this.data.rows.clear()
      return existed
    }
  },
  'deletes what is running although it must not': class extends ModelStore {
    override delete(key: string) {
      return super.delete(key)
    }
  },
  'deletes nothing unless it may delete what is running': class extends ModelStore {
    override async delete(key: string, unlessRunning?: boolean) {
      return !unlessRunning && super.delete(key)
    }
  },
  'cannot be closed twice': class extends ModelStore {
    #closed = false
    override async close() {
      if (this.#closed) throw new Error('Closed already')
      this.#closed = true
    }
  },
  'closes what others use': class extends ModelStore {
    override async close() {
      this.data.rows.clear()
    }
  },

  'does not answer a completion': class extends ModelStore {
    override complete() {
      return never
    }
  },
  'throws where it should reject': class extends ModelStore {
    override acquire(): never {
      throw new Error('Not connected')
    }
  },
  'throws where it cannot decode': class extends ModelStore {
    override acquire(key: string, claim: Claim): Promise<Acquisition> {
      const row = this.known(key, this.now())
      if (row?.state === 'completed') this.decode(row.record)
      return super.acquire(key, claim)
    }
  },
  'answers without a promise': class extends ModelStore {
    override renew() {
      return true as unknown as Promise<boolean>
    }
  },
  'answers with the number of rows': class extends ModelStore {
    override async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
      return Number(await super.complete(key, token, record, ttlMs)) as unknown as boolean
    }
  },
  'rejects what it is asked': class extends ModelStore {
    override async release(): Promise<boolean> {
      throw new Error('Not connected')
    }
  },
  'asks nobody for a token to step': class extends ModelStore {
    protected override owns(step: Step, row: Row, token: string, now: number) {
      return step === 'step' || super.owns(step, row, token, now)
    }
  },
  'keeps the steps of former owners': (() => {
    // What takes over goes on with the list of before.
    const formers = new WeakMap<StoredStep[], string[]>()
    return class extends ModelStore {
      protected override owns(step: Step, row: Row, token: string, now: number) {
        const isFormer = step === 'step' && formers.get(row.steps)?.includes(token)
        return isFormer || super.owns(step, row, token, now)
      }
      protected override found(row: Row) {
        formers.set(row.steps, [...(formers.get(row.steps) ?? []), row.token])
        return super.found(row)
      }
    }
  })(),
  'keeps no steps of a lapsed claim': class extends ModelStore {
    protected override owns(step: Step, row: Row, token: string, now: number) {
      return super.owns(step, row, token, now) && (step !== 'step' || row.leaseEnd > now)
    }
  },
  'takes a step that it has refused for one that it keeps': class extends ModelStore {
    override async step(key: string, token: string, step: StoredStep) {
      const row = this.known(key, this.now())
      if (row?.state === 'running' && row.token !== token) row.found ??= this.found(row)
      return super.step(key, token, step)
    }
  },
  'looks first and keeps a step later': class extends ModelStore {
    override async step(key: string, token: string, [name, result]: StoredStep) {
      const now = this.now()
      const row = this.known(key, now)
      await sleep(1)
      if (row?.state !== 'running' || row.token !== token) return false
      // As it was when it was looked at.
      if (!this.has(row, name)) this.keep(row, [name, result], now)
      return true
    }
  },
  'reads steps first and writes them later': class extends ModelStore {
    override async step(key: string, token: string, [name, result]: StoredStep) {
      const before = [...(this.known(key, this.now())?.steps ?? [])]
      await sleep(1)
      const row = this.known(key, this.now())
      if (row?.state === 'running' && row.token === token && !this.has(row, name)) row.steps = before
      return super.step(key, token, [name, result])
    }
  },
  'looks for a name first and keeps the step later': class extends ModelStore {
    #isNew = false
    override async step(key: string, token: string, [name, result]: StoredStep) {
      const row = this.known(key, this.now())
      const isNew = row !== undefined && !this.has(row, name)
      await sleep(1)
      this.#isNew = isNew
      const kept = super.step(key, token, [name, result])
      this.#isNew = false
      return kept
    }
    protected override has(row: Row, name: string) {
      return !this.#isNew && super.has(row, name)
    }
  },
  'overwrites a result with a later one': class extends ModelStore {
    protected override has({ steps }: Row, name: string) {
      const at = steps.findIndex(([known]) => known === name)
      if (at >= 0) steps.splice(at, 1)
      return false
    }
  },
  'says no to a step that there is already': class extends ModelStore {
    protected override again(step: Step) {
      return step !== 'step'
    }
  },
  'knows a step again within its attempt only': (() => {
    const attempts = new WeakMap<StoredStep, number>()
    return class extends ModelStore {
      protected override has({ steps, attempt }: Row, name: string) {
        return steps.some((step) => step[0] === name && attempts.get(step) === attempt)
      }
      protected override keep(row: Row, step: StoredStep, now: number) {
        super.keep(row, step, now)
        attempts.set(row.steps.at(-1) as StoredStep, row.attempt)
      }
    }
  })(),
  'sorts steps by their names': stepping((steps) => steps.sort(([a], [b]) => (a < b ? -1 : 1))),
  'folds the case of the names of steps': class extends ModelStore {
    protected override has({ steps }: Row, name: string) {
      return steps.some(([known]) => known.toLowerCase() === name.toLowerCase())
    }
  },
  'ends results of steps at a NUL': stepping((steps) =>
    steps.map(([name, result]) => [name, result.split('\0')[0] as string])
  ),
  'takes an empty result of a step for none': stepping((steps) => steps.filter(([, result]) => result !== '')),
  'cuts results of steps at 65,535 characters': stepping((steps) =>
    steps.map(([name, result]) => [name, result.slice(0, 65_535)])
  ),
  'tells that there are no steps': class extends ModelStore {
    protected override stepsOf({ steps }: Row) {
      return { steps: steps.map(([name, result]): StoredStep => [name, result]) }
    }
  },
  'keeps the fingerprint of a claim with steps that is repeated': class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      const row = this.known(key, this.now())
      const same = row?.state === 'running' && row.token === claim.token && row.steps.length > 0
      return super.acquire(key, same ? { ...claim, fingerprint: row.fingerprint } : claim)
    }
  },
  'gives steps to none but those who take over': class extends ModelStore {
    override async acquire(key: string, claim: Claim) {
      const row = this.known(key, this.now())
      const { steps, ...found } = (await super.acquire(key, claim)) as Acquisition & { steps?: StoredStep[] }
      return found.state !== 'acquired' || row?.token !== claim.token ? { ...found, ...(steps && { steps }) } : found
    }
  },
  'shows steps to their owner only': class extends ModelStore {
    protected override held(row: Row, now: number) {
      return super.held({ ...row, steps: [] }, now)
    }
  },
  'does not show steps to those who look': class extends ModelStore {
    override async get(key: string) {
      const found = (await super.get(key)) as (Acquisition & { steps?: StoredStep[] }) | null
      delete found?.steps
      return found
    }
  },
  'prolongs a lease by a step': class extends ModelStore {
    protected override keep(row: Row, step: StoredStep, now: number) {
      super.keep(row, step, now)
      if (row.leaseEnd > now) row.leaseEnd += 100
    }
  },
  'remembers a claim with steps for ever': class extends ModelStore {
    protected override keep(row: Row, step: StoredStep, now: number) {
      super.keep(row, step, now)
      row.expires = Number.POSITIVE_INFINITY
    }
  },
  'keeps the steps of what it has forgotten': class extends ModelStore {
    protected override take(key: string, claim: Claim, attempt: number, now: number, found?: Found) {
      const { steps } = this.data.rows.get(this.rowKey(key)) ?? { steps: [] }
      super.take(key, claim, attempt, now, found)
      const row = this.data.rows.get(this.rowKey(key)) as Row
      row.steps = steps
      return this.acquired(row)
    }
  },
  'forgets a first attempt with steps when it is released': class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      super.giveBack(row, found, unused, now)
      if (found === null) Object.assign(row, { state: 'released', expires: now + 60_000 })
    }
  },
  'forgets the steps of what is released': class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      super.giveBack(row, found, unused, now)
      row.steps = []
    }
  },
  'takes back a first attempt with steps': class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      super.giveBack(row, found, unused, now)
      if (unused && found === null) row.attempt--
    }
  },
  'remembers a first attempt with steps that was released for ever': class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      super.giveBack(row, found, unused, now)
      if (found === null) row.expires = Number.POSITIVE_INFINITY
    }
  },
  'forgets who has released a claim with steps': class extends ModelStore {
    override async release(key: string, token: string, unused?: boolean) {
      const row = this.known(key, this.now())
      return (row?.state !== 'ended' || row.steps.length === 0) && super.release(key, token, unused)
    }
  },
  'forgets the steps of what is released unused': class extends ModelStore {
    protected override giveBack(row: Row, found: Found | null, unused: boolean, now: number) {
      super.giveBack(row, found, unused, now)
      if (unused && found !== null) row.steps = []
    }
  },
  'gives the steps of what is completed': (() => {
    const finished = new WeakMap<Row, StoredStep[]>()
    return class extends ModelStore {
      override async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
        const row = this.known(key, this.now())
        if (row !== undefined && row.steps.length > 0) finished.set(row, row.steps)
        return super.complete(key, token, record, ttlMs)
      }
      protected override completed(row: Row, now: number) {
        const steps = finished.get(row)
        return { ...super.completed(row, now), ...(steps && { steps }) } as Acquisition
      }
    }
  })(),
  'says yes to a step of what is over': class extends ModelStore {
    override async step(key: string, token: string, step: StoredStep) {
      const row = this.known(key, this.now())
      return (row !== undefined && row.state !== 'running' && row.token === token) || super.step(key, token, step)
    }
  },
  'gives the steps of what was deleted': (() => {
    const deleted = new Map<string, StoredStep[]>()
    return class extends ModelStore {
      override async delete(key: string, unlessRunning?: boolean) {
        deleted.set(key, this.known(key, this.now())?.steps ?? [])
        return super.delete(key, unlessRunning)
      }
      protected override take(key: string, claim: Claim, attempt: number, now: number, found?: Found) {
        const steps = deleted.get(key)
        deleted.delete(key)
        const taken = super.take(key, claim, attempt, now, found)
        return { ...taken, ...(steps && steps.length > 0 && { steps }) } as Acquisition
      }
    }
  })(),
  'wakes nobody when a claim is given back that has steps': class extends ModelStore {
    protected override ended(key: string, how: How) {
      const row = this.data.rows.get(this.rowKey(key))
      if (how !== 'released' || row?.steps.length === 0) super.ended(key, how)
    }
  },
  'keeps the step that it was given': class extends ModelStore {
    protected override keep(row: Row, step: StoredStep) {
      row.steps.push(step)
    }
  },
  'gives the steps that it keeps': class extends ModelStore {
    protected override stepsOf({ steps }: Row) {
      return steps.length === 0 ? {} : { steps }
    }
  },

  'lists leases in seconds': listing((found) =>
    found.state === 'running' ? { ...found, leaseMs: found.leaseMs / 1_000 } : found
  ),
  'lists what has lapsed as if that were just now': listing((found) =>
    found.state === 'abandoned' ? { ...found, lapsedMs: 0 } : found
  ),
  'lists what has lapsed as if that were long ago': listing((found) =>
    found.state === 'abandoned' ? { ...found, lapsedMs: found.lapsedMs + 60_000 } : found
  ),
  'does not list that a claim has ended': listing(({ ...found }) => {
    if (found.state === 'abandoned') delete found.ended
    return found
  }),
  'lists what was given back as running': class extends ModelStore {
    protected override isOneOf(kinds: readonly ListedKind[], found: ListedKey) {
      if (found.state === 'abandoned' && found.ended) return kinds.includes('running')
      return super.isOneOf(kinds, found)
    }
  },
  'lists every tombstone by the same reason': listing((found) =>
    found.state === 'completed' && typeof found.outcome === 'string' ? { ...found, outcome: 'too-large' } : found
  ),
  'lists every reply by the same status': listing((found) =>
    found.state === 'completed' && typeof found.outcome === 'number' ? { ...found, outcome: 201 } : found
  ),
  'lists no ttl as infinity': listing((found) =>
    found.state === 'completed' ? { ...found, ttlMs: found.ttlMs ?? Number.POSITIVE_INFINITY } : found
  ),
  'lists all kinds': class extends ModelStore {
    protected override isOneOf() {
      return true
    }
  },
  'lists one kind at a time': class extends ModelStore {
    protected override isOneOf([kind]: readonly ListedKind[], found: ListedKey) {
      return super.isOneOf([kind as ListedKind], found)
    }
  },
  'lists one page': class extends ModelStore {
    override async list(kinds: readonly ListedKind[], cursor: string | null) {
      return { ...(await super.list(kinds, cursor)), cursor: null }
    }
  },
  'lists the first page again and again': class extends ModelStore {
    override list(kinds: readonly ListedKind[]) {
      return super.list(kinds, null)
    }
  },
  'lists what was released': class extends ModelStore {
    protected override listed(key: string, now: number) {
      const row = this.known(key, now)
      if (row?.state !== 'released') return super.listed(key, now)
      const { fingerprint, attempt } = row
      return { key, state: 'abandoned' as const, fingerprint, attempt, lapsedMs: 0 }
    }
  },
  'lists what has expired': class extends ModelStore {
    protected override listed(key: string, now: number) {
      const row = this.data.rows.get(key)
      return super.listed(key, row === undefined ? now : Math.min(now, row.expires - 0.1))
    }
  },
  'lists keys as they might be in a URL': listing((found) => ({ ...found, key: encodeURIComponent(found.key) })),
  'takes over what it lists': class extends ModelStore {
    protected override listed(key: string, now: number) {
      const found = super.listed(key, now)
      if (found?.state === 'abandoned') void super.acquire(key, looker)
      return found
    }
  },
  'prolongs what it lists': class extends ModelStore {
    protected override listed(key: string, now: number) {
      const row = this.known(key, now)
      if (row?.state === 'running' && row.leaseEnd > now) row.leaseEnd += 60_000
      return super.listed(key, now)
    }
  },
  'tells who gets a key nothing of how long it was abandoned': answering(({ ...found }) => {
    if (found.state === 'abandoned') delete found.lapsedMs
    return found
  }),
  'tells who gets a key nothing of the attempt that runs': answering(({ ...found }) => {
    if (found.state === 'running') delete found.attempt
    return found
  }),
  'cannot list beside what it cannot decode': class extends ModelStore {
    protected override listed(key: string, now: number) {
      const row = this.known(key, now)
      if (row?.state === 'completed') this.decode(row.record)
      return super.listed(key, now)
    }
  },

  'keeps what was settled for an hour': class extends ModelStore {
    protected override put(row: Row, settlement: Exclude<Settlement, 'ended'>, now: number) {
      super.put(row, { ...settlement, ttlMs: 3_600_000 }, now)
    }
  },
  'settles by a reply only': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      if (settlement !== 'ended' && settlement.record.kind === 'tombstone') return false
      return super.settle(key, fingerprint, settlement)
    }
  },
  'settles no tombstones': class extends ModelStore {
    protected override isUnsettled(row: Row, now: number) {
      return row.state !== 'completed' && super.isUnsettled(row, now)
    }
  },
  'settles nothing as ended': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      return settlement !== 'ended' && super.settle(key, fingerprint, settlement)
    }
  },
  'forgets what it settles as ended': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      const settled = await super.settle(key, fingerprint, settlement)
      if (settled && settlement === 'ended') this.data.rows.delete(key)
      return settled
    }
  },
  'forgets the steps of what it settles as ended': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      const settled = await super.settle(key, fingerprint, settlement)
      const row = this.known(key, this.now())
      if (settled && row) row.steps = []
      return settled
    }
  },
  'settles nothing that has ended': class extends ModelStore {
    protected override isUnsettled(row: Row, now: number) {
      return row.state !== 'ended' && super.isUnsettled(row, now)
    }
  },
  'settles what is running': class extends ModelStore {
    protected override isUnsettled(row: Row, now: number) {
      return row.state === 'running' || super.isUnsettled(row, now)
    }
  },
  'settles what has a reply': class extends ModelStore {
    protected override isUnsettled(row: Row, now: number) {
      return row.state === 'completed' || super.isUnsettled(row, now)
    }
  },
  'settles what was released': class extends ModelStore {
    protected override isUnsettled(row: Row, now: number) {
      return row.state === 'released' || super.isUnsettled(row, now)
    }
  },
  'settles what has expired': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      const row = this.data.rows.get(key)
      if (row?.state === 'completed') row.expires = Number.POSITIVE_INFINITY
      return super.settle(key, fingerprint, settlement)
    }
  },
  'lets a tombstone be as if it were given back': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      const row = this.known(key, this.now())
      if (settlement === 'ended' && row?.state === 'completed' && this.isUnsettled(row, this.now())) row.state = 'ended'
      return super.settle(key, fingerprint, settlement)
    }
  },
  'settles whatever the fingerprint is': class extends ModelStore {
    protected override isMeant() {
      return true
    }
  },
  'trims the fingerprint of what it settles': class extends ModelStore {
    protected override isMeant(row: Row, fingerprint: string) {
      return super.isMeant(row, fingerprint.trim())
    }
  },
  'leaves what it settles to the owner of before': class extends ModelStore {
    protected override nobody(row: Row) {
      return row.token
    }
  },
  'lets the owner of before complete what was settled as ended': (() => {
    const owners = new WeakMap<Row, string>()
    return class extends ModelStore {
      override async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null) {
        const row = this.known(key, this.now())
        if (row?.state === 'ended' && owners.get(row) === token) Object.assign(row, { state: 'running', token })
        return super.complete(key, token, record, ttlMs)
      }
      protected override nobody(row: Row) {
        owners.set(row, row.token)
        return super.nobody(row)
      }
    }
  })(),
  'looks first and settles later': class extends ModelStore {
    override async settle(key: string, fingerprint: string, settlement: Settlement) {
      const now = this.now()
      const row = this.known(key, now)
      if (row === undefined || !this.isUnsettled(row, now)) return false
      const seen = { ...row }
      await sleep(1)
      // As it was when it was looked at.
      this.data.rows.set(this.rowKey(key), seen)
      return super.settle(key, fingerprint, settlement)
    }
  }
}

export const brokenStores: Record<string, () => StoreUnderTest | IdempotencyStore> = {
  ...Object.fromEntries(Object.entries(models).map(([name, Store]) => [name, clients(Store)])),
  'is deaf after its connection broke': () => {
    const data = new ModelData()
    return {
      store: new ModelStore(data),
      second: new ModelStore(data),
      interrupt: () => void data.ended.removeAllListeners()
    }
  },
  'cannot listen again after its connection broke': () => {
    const data = new ModelData()
    let isDeaf = false
    class Store extends ModelStore {
      protected override listen(key: string, signal: AbortSignal) {
        return isDeaf ? never : super.listen(key, signal)
      }
    }
    const interrupt = () => {
      isDeaf = true
    }
    return { store: new Store(data), second: new Store(data), interrupt }
  },
  'loses its data when its connection breaks': () => {
    const data = new ModelData()
    return { store: new ModelStore(data), second: new ModelStore(data), interrupt: () => data.rows.clear() }
  },
  'shares nothing between clients': () => ({ store: new ModelStore(), second: new ModelStore() }),
  'does not answer': () => {
    const answer = () => never
    return { acquire: answer, renew: answer, complete: answer, release: answer }
  }
}
