import type { KeyObject } from 'node:crypto'
import type {
  Acquisition,
  Claim,
  ClaimTransaction,
  IdempotencyStore,
  ListedPage,
  Settlement,
  StoredRecord,
  TransactionAcquisition,
  TransactionClaim,
  TransactionClient,
  TransactionOutcome
} from '../../../types/index.js'
import { InvalidOption } from '../../errors.js'
import { ANYTHING, checked } from '../../option-rules.js'
import { describeSecret, describeStore } from '../../util/describe.js'
import { isInFrontOf } from '../innermost.js'
import { A_STORE, isStore } from '../is-store.js'
import { Records } from './records.js'
import { Keyring, secretOf } from './sealing.js'

/** 32 random bytes: as they are, as text in base64, base64url or hex, or as a `KeyObject`. */
export type EncryptionKey = Uint8Array | string | KeyObject

/** Options of an `EncryptedStore`. */
export interface EncryptedStoreOptions {
  /**
   * The first key encrypts, all of them decrypt. A new one goes to the end of the list first, until every process
   * knows it, and then to the front; an old one can go when nothing is left that it has encrypted.
   */
  keys: readonly EncryptionKey[]
}

/**
 * Encrypts what another store keeps: replies with their status, headers and bodies, the times of records, the results of
 * steps, and the fingerprints of requests, which are hashes of payloads that one might guess, with the route, the caller's
 * mark and the time that stand behind them. Each is bound to its key, and a result to the name of its step: moved to another
 * one, or changed in any bit, it cannot be decrypted, which is an error of the store, and never a reply. A list leaves it out.
 *
 * In the clear stay: storage keys (hashes), tokens, the names of steps, attempts, leases and ttls, sizes, whether there is a
 * claim, a reply or a tombstone, and why there is a tombstone: so the other store can tell which may be settled. A reason that
 * was changed is an error as well, but for 'too-large', which is what the other store makes of what it has no room for.
 */
export class EncryptedStore implements IdempotencyStore {
  // What a store need not have, this one has where the other has it.
  readonly sharesLocks: boolean
  readonly step?: NonNullable<IdempotencyStore['step']>
  readonly changed?: NonNullable<IdempotencyStore['changed']>
  readonly get?: NonNullable<IdempotencyStore['get']>
  readonly delete?: NonNullable<IdempotencyStore['delete']>
  readonly list?: NonNullable<IdempotencyStore['list']>
  readonly settle?: NonNullable<IdempotencyStore['settle']>
  readonly begin?: NonNullable<IdempotencyStore['begin']>
  readonly close?: NonNullable<IdempotencyStore['close']>
  readonly #store: IdempotencyStore
  readonly #records: Records

  /** @throws FST_IDEMPOTENCY_INVALID_OPTION */
  constructor(store: IdempotencyStore, options: EncryptedStoreOptions) {
    if (!isStore(store)) throw new InvalidOption(`EncryptedStore takes ${A_STORE}, got ${describeStore(store)}`)
    // Which is looked at without showing what is in it.
    const rules = { keys: ANYTHING }
    const { keys } = checked<EncryptedStoreOptions>(options ?? {}, rules, { owner: 'EncryptedStore ' })
    this.#store = store
    isInFrontOf(this, store)
    this.#records = new Records(new Keyring(secretsOf(keys)))
    const { step, changed, get, delete: forget, list, settle, begin, close } = store
    this.sharesLocks = store.sharesLocks === true
    if (step) this.step = async (key, token, done) => step.call(store, key, token, this.#records.sealedStep(key, done))
    if (changed) this.changed = (key, signal) => changed.call(store, key, signal)
    if (get) this.get = async (key) => this.#records.open(key, await get.call(store, key))
    if (forget) this.delete = (key, unlessRunning) => forget.call(store, key, unlessRunning)
    if (list) this.list = async (kinds, cursor) => this.#opened(await list.call(store, kinds, cursor))
    if (get && settle) {
      const [look, settleAs] = [get.bind(store), settle.bind(store)]
      this.settle = (...args) => this.#settle(look, settleAs, ...args)
    }
    if (begin) this.begin = (key, claim) => this.#begin(begin.bind(store), key, claim)
    if (close) this.close = () => close.call(store)
  }

  async acquire(key: string, claim: Claim): Promise<Acquisition> {
    return this.#records.open(key, await this.#store.acquire(key, this.#records.sealedClaim(key, claim)))
  }

  renew(key: string, token: string, leaseMs: number): Promise<boolean> {
    return this.#store.renew(key, token, leaseMs)
  }

  async complete(key: string, token: string, record: StoredRecord, ttlMs: number | null): Promise<boolean> {
    return this.#store.complete(key, token, this.#records.seal(key, record), ttlMs)
  }

  release(key: string, token: string, unused?: boolean): Promise<boolean> {
    return this.#store.release(key, token, unused)
  }

  #opened({ keys, cursor }: ListedPage): ListedPage {
    return { keys: keys.map((listed) => this.#records.openListed(listed)).filter((listed) => listed !== null), cursor }
  }

  /**
   * The other store compares fingerprints as they are sealed, and none is sealed twice alike. So it is given the one that it
   * has, if that is the right one when opened: then it settles what was looked at, and nothing else.
   */
  async #settle(
    look: NonNullable<IdempotencyStore['get']>,
    settleAs: NonNullable<IdempotencyStore['settle']>,
    key: string,
    fingerprint: string,
    settlement: Settlement
  ): Promise<boolean> {
    const sealed = this.#records.sealedSettlement(key, settlement)
    for (let before: string | null = null; ; ) {
      const found = this.#records.unsettled(key, await look(key))
      // Who is refused looks again: another one may be there, with the same fingerprint sealed anew.
      if (found?.fingerprint !== fingerprint || found.sealed === before) return false
      if (await settleAs(key, found.sealed, sealed)) return true
      before = found.sealed
    }
  }

  async #begin(
    begin: NonNullable<IdempotencyStore['begin']>,
    key: string,
    claim: TransactionClaim
  ): Promise<TransactionAcquisition> {
    const found = await begin(key, this.#records.sealedClaim(key, claim))
    if (found.state !== 'acquired') return this.#records.open(key, found)
    return {
      ...found,
      transaction: new SealingTransaction(found.transaction, (record) => this.#records.seal(key, record))
    }
  }
}

/** The transaction of another store, the record of which is encrypted. */
class SealingTransaction implements ClaimTransaction {
  readonly #transaction: ClaimTransaction
  readonly #seal: (record: StoredRecord) => StoredRecord

  constructor(transaction: ClaimTransaction, seal: (record: StoredRecord) => StoredRecord) {
    this.#transaction = transaction
    this.#seal = seal
  }

  get client(): TransactionClient {
    return this.#transaction.client
  }

  get lost(): AbortSignal {
    return this.#transaction.lost
  }

  async complete(record: StoredRecord, ttlMs: number | null, undo?: boolean): Promise<TransactionOutcome> {
    return this.#transaction.complete(this.#seal(record), ttlMs, undo)
  }

  rollback(): Promise<boolean> {
    return this.#transaction.rollback()
  }

  keepAlive(): void {
    this.#transaction.keepAlive()
  }

  abandon(): void {
    this.#transaction.abandon()
  }
}

/** @throws FST_IDEMPOTENCY_INVALID_OPTION, without the keys themselves: they are secrets. */
function secretsOf(keys: unknown): KeyObject[] {
  if (!Array.isArray(keys) || keys.length === 0) {
    throw new InvalidOption(`EncryptedStore option "keys" takes an array of keys, got ${describeSecret(keys)}`)
  }
  return keys.map((key: unknown, n) => {
    const secret = secretOf(key)
    if (secret === null) {
      const what = '32 bytes, as they are, in base64 or in hex, or a KeyObject'
      throw new InvalidOption(
        `EncryptedStore option "keys" takes keys of ${what}; keys[${n}] is ${describeSecret(key)}`
      )
    }
    if (keys.slice(0, n).some((other) => secretOf(other)?.equals(secret))) {
      throw new InvalidOption(`EncryptedStore option "keys" takes each key once; keys[${n}] is there already`)
    }
    return secret
  })
}
