/** What a caller brings when it asks for a key. */
export interface Claim {
  /**
   * Names the owner. Made by the caller, never by the store: a repeated call with the same token is the same claim. At
   * most 255 bytes.
   */
  token: string
  /** What the request looks like, as far as it is known at this point. Opaque to the store. */
  fingerprint: string
  /** Milliseconds for which the claim is safe from others without being renewed. */
  leaseMs: number
  /**
   * Milliseconds, after the lease, for which an unfinished claim is remembered, so that `attempt` and `abandoned` survive
   * it. 0 for a claim whose handler has not started: nothing is lost with it.
   */
  retainMs: number
  /** May this claim take over a key whose owner's lease has lapsed? */
  takeover: boolean
  /**
   * `false`: nobody wants to know what is left of the ttl of a completed operation, and a store that would have to ask
   * once more for it may answer `ttlMs: null`.
   * @default true
   */
  withTtl?: boolean
}

/** A finished step of an operation: its name, and its result. Both are opaque to the store. */
export type StoredStep = readonly [name: string, result: string]

/**
 * What holds a key, or that it is now ours. `steps` are those that all attempts at the operation have finished, in the
 * order in which they were stored; left out where there are none.
 */
export type Acquisition =
  /** The key belongs to the caller's token. `attempt` is 1, and one more than what was abandoned after each takeover. */
  | { state: 'acquired'; attempt: number; steps?: readonly StoredStep[] }
  /** Another token holds the key under a lease with `leaseMs` milliseconds to go. `attempt` is left out where it is not known. */
  | { state: 'running'; fingerprint: string; leaseMs: number; attempt?: number; steps?: readonly StoredStep[] }
  /**
   * The operation has no result and no owner, and the claim did not ask to take over: the owner's lease lapsed, or, with
   * `ended`, the owner has given back what had begun: steps of it are finished, or an earlier attempt was interrupted.
   * `lapsedMs`: how many milliseconds ago; left out where it is not known.
   */
  | {
      state: 'abandoned'
      fingerprint: string
      attempt: number
      ended?: true
      lapsedMs?: number
      steps?: readonly StoredStep[]
    }
  /** The operation has ended. `ttlMs` is what is left of the record's life, `null` for ever (see `withTtl`). */
  | { state: 'completed'; record: StoredRecord; ttlMs: number | null }

/** A reply header as it is stored: its lower-case name and its value or values. */
export type StoredHeader = [name: string, value: string | string[]]

/** Why there is no reply: it could not be kept; or, `settled`, somebody has decided that there will be none. */
export type TombstoneReason = 'too-large' | 'stream-failed' | 'hijacked' | 'redact-failed' | 'settled'

/** What is known of every finished operation. */
export interface RecordBase {
  /** What the request looked like. Opaque to the store. */
  fingerprint: string
  /** Wall-clock milliseconds since the epoch, for people; no decision rests on it. */
  createdAt: number
}

/** A reply that can be sent again, byte for byte. */
export interface StoredReply extends RecordBase {
  kind: 'reply'
  statusCode: number
  headers: StoredHeader[]
  body: Buffer
  /** The payload was a string, and is replayed as one. */
  text: boolean
}

/** The operation ran, but its reply could not be kept: it must neither run again nor be replayed. */
export interface Tombstone extends RecordBase {
  kind: 'tombstone'
  reason: TombstoneReason
}

/** What is kept of a finished operation. */
export type StoredRecord = StoredReply | Tombstone

/** What `list` is asked for. */
export type ListedKind = 'running' | 'abandoned' | 'reply' | 'tombstone'

/** What is listed of an operation without a result: see `Acquisition`. */
export type Unfinished =
  | { state: 'running'; fingerprint: string; attempt: number; leaseMs: number }
  | { state: 'abandoned'; fingerprint: string; attempt: number; ended?: true; lapsedMs: number }

/** What is listed of a finished operation: of a reply its status code, of a tombstone its reason. */
export interface Finished {
  state: 'completed'
  fingerprint: string
  createdAt: number
  outcome: number | TombstoneReason
  ttlMs: number | null
}

/** What holds a key, without what may be large. */
export type ListedKey = { key: string } & (Unfinished | Finished)

/** A part of what `list` finds. */
export interface ListedPage {
  readonly keys: readonly ListedKey[]
  /** For the next page; `null` after the last one. */
  readonly cursor: string | null
}

/** What becomes of a key whose outcome somebody has decided: a record, or `'ended'`, that a retry may run. */
export type Settlement = { readonly record: StoredRecord; readonly ttlMs: number | null } | 'ended'

/**
 * Where claims and records live. Every method is one atomic step: no other call on the same key may be
 * seen to happen between what it reads and what it writes. Time is the store's own clock, and an expired
 * lease and an expired record are dealt with inside `acquire`.
 *
 * `false` from `renew`, `step`, `complete` or `release` means that the token does not own the key, and that
 * nothing was changed. A rejected promise means that the outcome is not known; so it is with a record that cannot be
 * decoded. No method throws.
 *
 * Keys, tokens and fingerprints are any text, and are the same only when they are so to the letter. Claims and records
 * are the caller's: what becomes of them once the call was made, or the answer given, does not change what is stored.
 *
 * `storeConformance` of `fastify-idempotency/testkit` tries all of this.
 */
export interface IdempotencyStore {
  /**
   * May a transaction of the application keep the store from writing, until it ends? So it is where both are in one file of
   * SQLite. A step in a transaction then tells the store what it has to know after the commit; what is before it rests on the
   * lease.
   */
  readonly sharesLocks?: boolean
  /**
   * Takes the key, or says what holds it. A repeated call with the token that holds the key is `acquired`
   * again, so that a caller who lost the answer can ask once more: lease, `retainMs` and fingerprint are those of the
   * newest call then, `attempt` stays.
   *
   * A store that has no room for another claim rejects with an error whose `code` is 'FST_IDEMPOTENCY_STORE_FULL': it is
   * there, and `onStoreError: 'bypass'` does not apply.
   */
  acquire(key: string, claim: Claim): Promise<Acquisition>
  /** Lets the claim live `leaseMs` from now. Also `true` for a lapsed lease that nobody has taken over. */
  renew(key: string, token: string, leaseMs: number): Promise<boolean>
  /**
   * Puts the record in the place of the claim, for `ttlMs` milliseconds from now, `null` for ever.
   * `true` again when this token's completion has already happened.
   */
  complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean>
  /**
   * Keeps a finished step with the claim, until it is completed or forgotten: takeovers and releases leave it. The lease
   * stays as it is. `true` again, and the first result stays, when the operation has a step of this name already. Without
   * this method handlers have no steps.
   *
   * A store that has no room for it rejects, and keeps all that it has.
   */
  step?(key: string, token: string, step: StoredStep): Promise<boolean>
  /**
   * Gives the key back: whoever asks next may have it. A first attempt without steps leaves nothing behind, as if it had
   * never been. Others have begun something that is not to be forgotten: the lease ends at once, and the key is
   * `abandoned`, with `ended: true`, the same attempt, fingerprint and steps, for the `retainMs` of its claim from now on.
   * `true` again when this token's release has already happened and nobody has claimed the key since.
   * @param unused The handler never ran: a key that was taken over is abandoned as it was found, with the attempt, the
   * fingerprint and the `ended` of then.
   */
  release(key: string, token: string, unused?: boolean): Promise<boolean>
  /**
   * Resolves when the key may have changed, at once when no claim is running on it, and when the signal
   * aborts. A change that follows the call is never missed, however early it comes. Without this method
   * duplicates that wait poll.
   */
  changed?(key: string, signal: AbortSignal): Promise<void>
  /** What holds the key, without touching it; `null` when nothing does. */
  get?(key: string): Promise<Acquisition | null>
  /**
   * Forgets the key, whatever holds it but an open transaction. `true` when there was something to forget.
   * @param unlessRunning Leaves a claim that is running, which is `false`.
   */
  delete?(key: string, unlessRunning?: boolean): Promise<boolean>
  /**
   * What there is, page by page, in no order. A key that is there from the first page to the last, and is so in one of these
   * ways, is on one of them at least; what changes meanwhile may be on none or on several. Left out is what cannot be
   * decoded, what an open transaction holds, and keys of more than 500 bytes. A page may be empty and not the last one.
   * @param kinds In which ways
   * @param cursor That of the page before; `null` for the first one.
   */
  list?(kinds: readonly ListedKind[], cursor: string | null): Promise<ListedPage>
  /**
   * Ends what nobody is running: puts the record in the place of an abandoned claim or of a tombstone; or, `'ended'`, lets an
   * abandoned claim be as if its owner had given it back now, with the same attempt, fingerprint and steps.
   * `false`, and nothing is changed, where there is no such thing, or not of this fingerprint.
   */
  settle?(key: string, fingerprint: string, settlement: Settlement): Promise<boolean>
  /**
   * Opens a transaction in the database that the store lives in, and takes the key inside it, in one step and
   * without waiting for another transaction that holds the key. Stores that have it can serve routes with
   * `transaction: true`.
   */
  begin?(key: string, claim: TransactionClaim): Promise<TransactionAcquisition>
  /**
   * Lets go of what the store itself opened: timers, its own connections. Never of a client it was given, nor of what is
   * stored. May be called again.
   */
  close?(): Promise<void>
}

/** What a caller brings when it asks for a key inside a transaction. */
export interface TransactionClaim extends Claim {
  /** Is somebody to be told when the transaction is over? Otherwise nobody waits for it. */
  wake: boolean
  /**
   * May the handler have transactions of its own in it? Then what begins or ends one on `client` becomes a savepoint; and a
   * success whose handler has left one open is refused. A store that cannot do that refuses such statements.
   */
  nested?: boolean
  /** Milliseconds after which a database that does not answer has failed, and its connection is cut. */
  timeoutMs: number
}

/** What holds a key, or that it is now ours, for as long as the transaction is open. */
export type TransactionAcquisition =
  | Exclude<Acquisition, { state: 'acquired' }>
  | { state: 'acquired'; attempt: number; transaction: ClaimTransaction }

/**
 * An open transaction that holds a key. It needs no lease: the transaction ends with its connection, and whatever
 * ends it without a commit has undone the claim together with all that was done on `client`.
 */
export interface ClaimTransaction {
  /** The database client on which the transaction is open. Nothing that is asked of it ends the transaction. */
  readonly client: TransactionClient
  /** Aborts when the transaction is gone, because its connection is. */
  readonly lost: AbortSignal
  /**
   * Puts the record in the place of the claim, and commits. Rejects when the store failed, or when it is not
   * known whether the commit has happened.
   * @param undo Commits the record alone, without what was done on `client`.
   */
  complete(record: StoredRecord, ttlMs: number | null, undo?: boolean): Promise<TransactionOutcome>
  /**
   * Undoes the claim and all that was done. Does not reject: a lost connection, which gives `false`, has the same
   * effect.
   */
  rollback(): Promise<boolean>
  /** Tells the database that this process is alive. */
  keepAlive(): void
  /** Undoes it all by cutting the connection, whatever is going on there. */
  abandon(): void
}

/** What became of a transaction: committed, or undone for an error that lies in what was done in it. */
export type TransactionOutcome = { state: 'committed' } | { state: 'refused'; error: Error }

/** A client of `pg`, as `@types/pg` describes it, which whoever uses one has; without them it is `any`. */
// biome-ignore lint/suspicious/noTsIgnore: an error is expected only where there is no pg.
/** @ts-ignore: pg is not a dependency of this package */
export type TransactionClient = import('pg').PoolClient
