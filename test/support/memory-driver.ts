import type { CasDriver, Content, Lasting, Row, RowPage, RowState } from '../../lib/stores/cas/driver.js'

/** A table in memory whose clock stands still until it is moved. */
export class MemoryDriver implements CasDriver {
  readonly rows = new Map<string, Content & { revision: string }>()
  /** What it was asked for, by the names of its methods. */
  readonly calls: string[] = []
  now = 1_000_000
  /** Called after each `find`, with how many there have been: something else happens before the answer is acted upon. */
  afterFind: (count: number) => Promise<unknown> | undefined = () => undefined
  #finds = 0

  async insert(key: string, revision: string, claim: Lasting): Promise<boolean> {
    this.calls.push('insert')
    if (this.rows.has(key)) return false
    this.rows.set(key, { state: 'running', ...this.#lasting(claim), revision })
    return true
  }

  async find(key: string): Promise<Row | null> {
    this.calls.push('find')
    const row = this.rows.get(key)
    const found = row === undefined ? null : { ...row, now: this.now }
    await this.afterFind(++this.#finds)
    return found
  }

  async replace(key: string, found: string, revision: string, content: Content): Promise<boolean> {
    this.calls.push('replace')
    if (this.rows.get(key)?.revision !== found) return false
    this.rows.set(key, { ...content, revision })
    return true
  }

  async complete(key: string, revision: string, record: Lasting): Promise<boolean> {
    this.calls.push('complete')
    const row = this.rows.get(key)
    if (row?.state !== 'running' || row.token !== record.token) return false
    if (row.expiresAt !== null && row.expiresAt <= this.now) return false
    this.rows.set(key, { state: 'completed', ...this.#lasting(record), revision })
    return true
  }

  async remove(key: string, found: string): Promise<boolean> {
    this.calls.push('remove')
    return this.rows.get(key)?.revision === found && this.rows.delete(key)
  }

  async running(keys: readonly string[]): Promise<readonly string[]> {
    this.calls.push('running')
    return keys.filter((key) => {
      const row = this.rows.get(key)
      return row?.state === 'running' && row.leaseEnd > this.now
    })
  }

  /** Two rows are a page. */
  async page(after: string | null, states: readonly RowState[], recordBytes: number): Promise<RowPage> {
    this.calls.push('page')
    const keys = [...this.rows.keys()].filter((key) => after === null || key > after).sort()
    const rows = keys.slice(0, 2).map((key) => {
      const row = this.rows.get(key) as Content & { revision: string }
      const value = row.state === 'completed' ? row.value.subarray(0, recordBytes) : row.value
      return { ...row, key, value, now: this.now }
    })
    const last = keys.length > 2 ? (keys[1] ?? null) : null
    return { rows: rows.filter(({ state }) => states.includes(state)), last }
  }

  async sweep(): Promise<boolean> {
    return false
  }

  claimFailure(error: unknown): unknown {
    return error
  }

  #lasting({ token, value, leaseMs, keepMs }: Lasting): Omit<Content, 'state'> {
    const { now } = this
    return { token, value, leaseEnd: now + leaseMs, expiresAt: keepMs === null ? null : now + keepMs }
  }
}
