import { randomUUID } from 'node:crypto'
import { EventEmitter } from 'node:events'
import type {
  Acquisition,
  Claim,
  IdempotencyStore,
  ListedKey,
  ListedKind,
  ListedPage,
  Settlement,
  StoredRecord,
  StoredReply,
  StoredStep,
  Unfinished
} from '../../types/index.js'

/** How many keys are a page, at least: it is a quarter of all, so that a list of many costs no more than it has to. */
const PAGE = 20

/** What is known of a key. All times are monotonic milliseconds. */
export interface Row {
  /** `ended` and `abandoned`: given back, and remembered. */
  state: 'running' | 'ended' | 'abandoned' | 'completed' | 'released'
  token: string
  fingerprint: string
  attempt: number
  leaseEnd: number
  retainMs: number
  expires: number
  /** What it took over; `null` for a first attempt. */
  found: Found | null
  /** Of all attempts. */
  steps: StoredStep[]
  /** The record as text. */
  record: string
}

export interface Found {
  state: 'ended' | 'abandoned'
  fingerprint: string
  steps: StoredStep[]
}

/** What several clients share. */
export class ModelData {
  readonly rows = new Map<string, Row>()
  /** Says the key of every claim that has ended. */
  readonly ended = new EventEmitter().setMaxListeners(0)
}

/**
 * A store that is right and simple: a table, records as text, and each decision in a method of its own, so that a
 * store which is wrong in one of them is an override.
 */
export class ModelStore implements IdempotencyStore {
  constructor(protected readonly data = new ModelData()) {}

  async acquire(key: string, claim: Claim): Promise<Acquisition> {
    const now = this.now()
    const row = this.known(key, now)
    if (row === undefined || row.state === 'released') return this.take(key, claim, 1, now)
    if (row.state === 'completed') return this.completed(row, now)
    if (row.state === 'running' && row.token === claim.token) {
      row.retainMs = claim.retainMs
      row.fingerprint = claim.fingerprint
      this.prolong(row, claim.leaseMs, now)
      return this.acquired(row)
    }
    if (row.leaseEnd > now || !this.mayTakeOver(claim)) return this.held(row, now)
    return this.take(key, claim, this.nextAttempt(row), now, this.found(row))
  }

  async renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    const now = this.now()
    const row = this.known(key, now)
    if (row?.state !== 'running' || !this.owns('renew', row, token, now)) return false
    this.prolong(row, leaseMs, now)
    return true
  }

  async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    const now = this.now()
    const row = this.known(key, now)
    if (row === undefined || !this.owns('complete', row, token, now)) return false
    if (row.state !== 'running') return row.state === 'completed' && this.again('complete')
    const expires = this.expires(row, ttlMs, now)
    Object.assign(row, { state: 'completed', record: this.encode(record), expires, steps: [] })
    this.ended(key, 'completed')
    return true
  }

  async step(key: string, token: string, step: StoredStep): Promise<boolean> {
    const now = this.now()
    const row = this.known(key, now)
    if (row?.state !== 'running' || !this.owns('step', row, token, now)) return false
    if (this.has(row, step[0])) return this.again('step')
    this.keep(row, step, now)
    return true
  }

  async release(key: string, token: string, unused = false): Promise<boolean> {
    const now = this.now()
    const row = this.known(key, now)
    if (row === undefined || row.state === 'completed' || !this.owns('release', row, token, now)) return false
    if (row.state !== 'running') return this.again('release')
    if (row.found === null && row.steps.length === 0) Object.assign(row, { state: 'released', expires: now + 60_000 })
    else this.giveBack(row, row.found, unused, now)
    this.ended(key, 'released')
    return true
  }

  async changed(key: string, signal: AbortSignal): Promise<void> {
    const now = this.now()
    const row = this.known(key, now)
    if (signal.aborted || row?.state !== 'running' || row.leaseEnd <= now) return
    await this.listen(key, signal)
  }

  async get(key: string): Promise<Acquisition | null> {
    const now = this.now()
    const row = this.known(key, now)
    if (row === undefined || row.state === 'released') return null
    return row.state === 'completed' ? this.completed(row, now) : this.held(row, now)
  }

  async delete(key: string, unlessRunning = false): Promise<boolean> {
    const now = this.now()
    const row = this.known(key, now)
    if (unlessRunning && row?.state === 'running' && row.leaseEnd > now) return false
    this.data.rows.delete(this.rowKey(key))
    if (row?.state === 'running') this.ended(key, 'deleted')
    return row !== undefined && row.state !== 'released'
  }

  async list(kinds: readonly ListedKind[], cursor: string | null): Promise<ListedPage> {
    const now = this.now()
    const rest = [...this.data.rows.keys()].filter((key) => cursor === null || key > cursor).sort()
    const count = Math.max(PAGE, Math.ceil(this.data.rows.size / 4))
    const listed = rest.slice(0, count).map((key) => this.listed(key, now))
    const keys = listed.filter((found) => found !== null && this.isOneOf(kinds, found)) as ListedKey[]
    return { keys, cursor: rest[count] === undefined ? null : (rest[count - 1] as string) }
  }

  async settle(key: string, fingerprint: string, settlement: Settlement): Promise<boolean> {
    const now = this.now()
    const row = this.known(key, now)
    if (row === undefined || !this.isUnsettled(row, now) || !this.isMeant(row, fingerprint)) return false
    if (settlement === 'ended' && row.state === 'completed') return false
    if (settlement === 'ended') this.giveBack(row, null, false, now)
    else this.put(row, settlement, now)
    row.token = this.nobody(row)
    return true
  }

  async close(): Promise<void> {}

  /** Makes the record under the key undecodable. */
  spoil(key: string): void {
    const row = this.data.rows.get(this.rowKey(key))
    if (row) row.record = row.record.slice(0, -1)
  }

  protected now(): number {
    return performance.now()
  }

  protected rowKey(key: string): string {
    return key
  }

  protected known(key: string, now: number): Row | undefined {
    const row = this.data.rows.get(this.rowKey(key))
    return row !== undefined && row.expires > now ? row : undefined
  }

  protected take(
    key: string,
    { token, fingerprint, leaseMs, retainMs }: Claim,
    attempt: number,
    now: number,
    found: Found | null = null
  ): Acquisition {
    const times = { leaseEnd: 0, retainMs, expires: 0 }
    const steps = found?.steps ?? []
    const row: Row = { state: 'running', token, fingerprint, attempt, ...times, found, steps, record: '' }
    this.prolong(row, leaseMs, now)
    this.data.rows.set(this.rowKey(key), row)
    return this.acquired(row)
  }

  protected prolong(row: Row, leaseMs: number, now: number): void {
    row.leaseEnd = now + leaseMs
    row.expires = row.leaseEnd + row.retainMs
  }

  /** What becomes of a claim that stands on an interrupted attempt, or has steps. */
  protected giveBack(row: Row, found: Found | null, unused: boolean, now: number): void {
    Object.assign(row, { state: 'ended', leaseEnd: now, expires: now + row.retainMs, found: null })
    if (unused && found !== null) Object.assign(row, found, { attempt: row.attempt - 1 })
  }

  protected found({ state, fingerprint, steps }: Row): Found {
    return { state: state === 'ended' ? 'ended' : 'abandoned', fingerprint, steps }
  }

  protected has(row: Row, name: string): boolean {
    return row.steps.some(([known]) => known === name)
  }

  protected keep(row: Row, [name, result]: StoredStep, _now: number): void {
    row.steps.push([name, result])
  }

  /** What an answer says of steps. */
  protected stepsOf({ steps }: Row): { steps?: StoredStep[] } {
    return steps.length === 0 ? {} : { steps: steps.map(([name, result]) => [name, result]) }
  }

  protected acquired(row: Row): Acquisition {
    return { state: 'acquired', attempt: row.attempt, ...this.stepsOf(row) }
  }

  protected mayTakeOver(claim: Claim): boolean {
    return claim.takeover
  }

  protected nextAttempt(row: Row): number {
    return row.attempt + 1
  }

  protected owns(_step: 'renew' | 'step' | 'complete' | 'release', row: Row, token: string, _now: number): boolean {
    return row.token === token
  }

  /** The answer to a step that this token has done before. */
  protected again(_step: 'step' | 'complete' | 'release'): boolean {
    return true
  }

  protected expires(_row: Row, ttlMs: number | null, now: number): number {
    return ttlMs === null ? Number.POSITIVE_INFINITY : now + ttlMs
  }

  protected held(row: Row, now: number): Unfinished & { steps?: StoredStep[] } {
    const { state, fingerprint, attempt, leaseEnd } = row
    if (leaseEnd > now) return { state: 'running', fingerprint, attempt, leaseMs: leaseEnd - now, ...this.stepsOf(row) }
    const found = { state: 'abandoned', fingerprint, attempt, lapsedMs: now - leaseEnd, ...this.stepsOf(row) } as const
    return state === 'ended' ? { ...found, ended: true } : found
  }

  protected completed({ record, expires }: Row, now: number): Acquisition {
    return { state: 'completed', record: this.decode(record), ttlMs: Number.isFinite(expires) ? expires - now : null }
  }

  /** What a list says of a row, whatever it is asked for. */
  protected listed(key: string, now: number): ListedKey | null {
    const row = this.known(key, now)
    if (row === undefined || row.state === 'released') return null
    if (row.state !== 'completed') {
      const { steps, ...found } = this.held(row, now)
      return { ...found, key }
    }
    try {
      const { fingerprint, createdAt, ...record } = this.decode(row.record)
      const outcome = record.kind === 'reply' ? record.statusCode : record.reason
      const ttlMs = Number.isFinite(row.expires) ? row.expires - now : null
      return { key, state: 'completed', fingerprint, createdAt, outcome, ttlMs }
    } catch {
      return null
    }
  }

  protected isOneOf(kinds: readonly ListedKind[], found: ListedKey): boolean {
    if (found.state !== 'completed') return kinds.includes(found.state)
    return kinds.includes(typeof found.outcome === 'number' ? 'reply' : 'tombstone')
  }

  /** Is nobody running it, and has it no reply? */
  protected isUnsettled({ state, leaseEnd, record }: Row, now: number): boolean {
    if (state === 'completed') return this.decode(record).kind === 'tombstone'
    return state !== 'released' && leaseEnd <= now
  }

  protected isMeant(row: Row, fingerprint: string): boolean {
    return (row.state === 'completed' ? this.decode(row.record) : row).fingerprint === fingerprint
  }

  protected put(row: Row, { record, ttlMs }: Exclude<Settlement, 'ended'>, now: number): void {
    const expires = this.expires(row, ttlMs, now)
    Object.assign(row, { state: 'completed', record: this.encode(record), expires, steps: [] })
  }

  /** Whose a settled key is. */
  protected nobody(_row: Row): string {
    return randomUUID()
  }

  protected encode(record: StoredRecord): string {
    return JSON.stringify(record.kind === 'reply' ? { ...record, body: record.body.toString('base64') } : record)
  }

  protected decode(text: string): StoredRecord {
    const record = JSON.parse(text)
    return record.kind === 'reply' ? { ...record, body: Buffer.from(record.body, 'base64') } : record
  }

  protected ended(key: string, _how: 'completed' | 'released' | 'deleted'): void {
    this.data.ended.emit(this.channel(key))
  }

  protected channel(key: string): string {
    return `key ${key}`
  }

  protected listen(key: string, signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        this.data.ended.off(this.channel(key), done)
        signal.removeEventListener('abort', done)
        resolve()
      }
      this.data.ended.on(this.channel(key), done)
      signal.addEventListener('abort', done)
    })
  }
}

/** A reply whose members are changed on their way into the table. */
export function altered(record: StoredRecord, change: (reply: StoredReply) => object): StoredRecord {
  return record.kind === 'reply' ? { ...record, ...change(record) } : record
}
