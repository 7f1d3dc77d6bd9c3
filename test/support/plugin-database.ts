import type { CommittedStep, TransactionalStep, Transactions } from '../../types/index.js'

/** A step that was committed. */
export interface Row {
  readonly result: string
  readonly fingerprint: string
  readonly expiresAt: number | null
}

/** Whose transactions they are: with it they end. */
interface Session {
  readonly dead: boolean
  readonly death: Promise<void>
  awake(): Promise<void>
}

/** A database that several processes use. It loses nothing, and can always be reached. */
export class Database {
  readonly #rows = new Map<string, Row>()
  readonly #open = new Map<string, Promise<void>>()

  /** @param committed Is told of what is committed, at that moment. */
  of(session: Session, committed: (row: Row) => void): Transactions<null> {
    return {
      once: (step, work) => this.#once(session, step, work, committed),
      forget: async () => false
    }
  }

  async #once(
    session: Session,
    { operation, name, fingerprint, expiresAt }: TransactionalStep,
    work: (tx: null) => Promise<string>,
    committed: (row: Row) => void
  ): Promise<CommittedStep> {
    const id = `${operation} ${name}`
    for (let other = this.#open.get(id); other !== undefined; other = this.#open.get(id)) {
      await other
      await session.awake()
    }
    const row = this.#rows.get(id)
    if (row !== undefined && !isExpired(row)) return { ...row, resumed: true }
    let end = () => {}
    const open = new Promise<void>((resolve) => {
      end = resolve
    })
    this.#open.set(id, open)
    try {
      const result = await Promise.race([work(null), session.death])
      if (result === undefined || session.dead) throw new Error('The connection has ended')
      const row = { result, fingerprint, expiresAt }
      this.#rows.set(id, row)
      committed(row)
      return { ...row, resumed: false }
    } finally {
      this.#open.delete(id)
      end()
    }
  }
}

export function isExpired({ expiresAt }: Row): boolean {
  return expiresAt !== null && expiresAt <= Date.now()
}
