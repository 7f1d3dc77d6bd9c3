import type { KeyObject } from 'node:crypto'
import { inspect } from 'node:util'
import type {
  Acquisition,
  Claim,
  ClaimTransaction,
  IdempotencyStore,
  StoredRecord,
  StoredStep,
  TransactionAcquisition,
  TransactionClaim,
  TransactionClient,
  TransactionOutcome
} from '../../../types/index.js'
import { InvalidOption, UnreadableAnswer } from '../../errors.js'
import { ANYTHING, checked } from '../../option-rules.js'
import { describeStore } from '../../util/describe.js'
import { isInFrontOf } from '../innermost.js'
import { A_STORE, isStore } from '../is-store.js'
import { decodeRecord, encodeRecord } from '../record-codec.js'
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

const NOTHING = Buffer.alloc(0)
/** What a sealed record looks like from outside, whatever is in it: a reply, of no time. */
const OUTSIDE = { kind: 'reply', createdAt: 0, statusCode: 200, headers: [], text: false } as const

/**
 * Encrypts what another store keeps: records, be they replies with their status, headers and bodies or tombstones with their
 * reasons, the times of both, the results of steps, and the fingerprints of requests, which are hashes of payloads that one
 * might guess. Each is bound to its key, and a result to the name of its step: moved to another one, or changed in any bit, it
 * cannot be decrypted, which is an error of the store, and never a reply.
 *
 * In the clear stay: storage keys (hashes), tokens, the names of steps, leases and ttls, sizes, and whether there is a claim or
 * a record. What is too large for the other store is a tombstone there.
 */
export class EncryptedStore implements IdempotencyStore {
  // What a store need not have, this one has where the other has it.
  readonly sharesLocks: boolean
  readonly step?: NonNullable<IdempotencyStore['step']>
  readonly changed?: NonNullable<IdempotencyStore['changed']>
  readonly get?: NonNullable<IdempotencyStore['get']>
  readonly delete?: NonNullable<IdempotencyStore['delete']>
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
    const { step, changed, get, delete: forget, begin, close } = store
    this.sharesLocks = store.sharesLocks === true
    if (step) this.step = async (key, token, done) => step.call(store, key, token, this.#records.sealedStep(key, done))
    if (changed) this.changed = (key, signal) => changed.call(store, key, signal)
    if (get) this.get = async (key) => this.#records.open(key, await get.call(store, key))
    if (forget) this.delete = (key) => forget.call(store, key)
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

/** Seals what goes to a store, and opens what comes from it. */
class Records {
  readonly #keyring: Keyring

  constructor(keyring: Keyring) {
    this.#keyring = keyring
  }

  sealedClaim<C extends Claim>(key: string, claim: C): C {
    return { ...claim, fingerprint: this.#sealFingerprint(key, claim.fingerprint) }
  }

  sealedStep(key: string, [name, result]: StoredStep): StoredStep {
    return [name, this.#keyring.seal(Buffer.from(result), aboutStep(key, name)).toString('base64url')]
  }

  seal(key: string, record: StoredRecord): StoredRecord {
    // The record has both as well; these are for stores that make a tombstone of what is too large for them.
    const base = JSON.stringify([record.fingerprint, record.createdAt])
    const fingerprint = this.#keyring.seal(Buffer.from(base), aboutBase(key)).toString('base64url')
    const body = this.#keyring.seal(encodeRecord(record, NOTHING), aboutRecord(key, fingerprint))
    return { ...OUTSIDE, fingerprint, headers: [], body }
  }

  open<Found extends Acquisition>(key: string, found: Found): Found
  open(key: string, found: Acquisition | null): Acquisition | null
  open(key: string, found: Acquisition | null): Acquisition | null {
    switch (found?.state) {
      case 'acquired':
        return { ...found, ...this.#openSteps(key, found.steps) }
      case 'running':
        // A claim that a transaction holds can be seen by nobody: what it looks like is not known.
        if (found.fingerprint === '') return found
        return { ...found, ...this.#openClaim(key, found) }
      case 'abandoned':
        return { ...found, ...this.#openClaim(key, found) }
      case 'completed':
        return { ...found, record: this.#open(key, found.record) }
      default:
        return found
    }
  }

  #openClaim(key: string, { fingerprint, steps }: { fingerprint: string; steps?: readonly StoredStep[] }) {
    return { fingerprint: this.#openFingerprint(key, fingerprint), ...this.#openSteps(key, steps) }
  }

  #openSteps(key: string, steps?: readonly StoredStep[]): { steps?: StoredStep[] } {
    if (steps === undefined) return {}
    const open = ([name, sealed]: StoredStep): StoredStep => [
      name,
      this.#keyring.open(Buffer.from(sealed, 'base64url'), aboutStep(key, name)).toString()
    ]
    return { steps: steps.map(open) }
  }

  #open(key: string, record: StoredRecord): StoredRecord {
    const { fingerprint: sealed } = record
    if (record.kind === 'tombstone') {
      if (record.reason !== 'too-large') {
        throw new UnreadableAnswer('A stored idempotency record is not encrypted, or damaged')
      }
      const base = this.#keyring.open(Buffer.from(sealed, 'base64url'), aboutBase(key)).toString()
      const [fingerprint, createdAt] = JSON.parse(base) as [string, number]
      return { kind: 'tombstone', reason: 'too-large', fingerprint, createdAt }
    }
    // None of it is used: but what is not as it was written was written by somebody else.
    const { createdAt, statusCode, headers, text, body } = record
    if (createdAt !== OUTSIDE.createdAt || statusCode !== OUTSIDE.statusCode || headers.length > 0 || text) {
      throw new UnreadableAnswer('A stored idempotency record is damaged')
    }
    return decodeRecord(this.#keyring.open(body, aboutRecord(key, sealed)), 0)
  }

  #sealFingerprint(key: string, fingerprint: string): string {
    return this.#keyring.seal(Buffer.from(JSON.stringify(fingerprint)), aboutFingerprint(key)).toString('base64url')
  }

  #openFingerprint(key: string, sealed: string): string {
    return JSON.parse(this.#keyring.open(Buffer.from(sealed, 'base64url'), aboutFingerprint(key)).toString())
  }
}

// What is sealed for one purpose and one key cannot be opened for another. JSON frames them unambiguously.

function aboutFingerprint(key: string): string {
  return JSON.stringify(['fingerprint', key])
}

function aboutStep(key: string, name: string): string {
  return JSON.stringify(['step', key, name])
}

function aboutBase(key: string): string {
  return JSON.stringify(['base', key])
}

function aboutRecord(key: string, base: string): string {
  return JSON.stringify(['record', key, base])
}

/** @throws FST_IDEMPOTENCY_INVALID_OPTION, without the keys themselves: they are secrets. */
function secretsOf(keys: unknown): KeyObject[] {
  if (!Array.isArray(keys) || keys.length === 0) {
    throw new InvalidOption(`EncryptedStore option "keys" takes an array of keys, got ${describe(keys)}`)
  }
  return keys.map((key: unknown, n) => {
    const secret = secretOf(key)
    if (secret === null) {
      const what = '32 bytes, as they are, in base64 or in hex, or a KeyObject'
      throw new InvalidOption(`EncryptedStore option "keys" takes keys of ${what}; keys[${n}] is ${describe(key)}`)
    }
    if (keys.slice(0, n).some((other) => secretOf(other)?.equals(secret))) {
      throw new InvalidOption(`EncryptedStore option "keys" takes each key once; keys[${n}] is there already`)
    }
    return secret
  })
}

/** What a value is, and nothing of what is in it. */
function describe(value: unknown): string {
  if (typeof value === 'string') return `a string of ${value.length} characters`
  if (ArrayBuffer.isView(value)) return `${value.byteLength} bytes (${value.constructor.name})`
  if (typeof value !== 'object' || value === null) return `${inspect(value).slice(0, 80)} (${typeof value})`
  return Array.isArray(value) ? `an array of ${value.length}` : inspect(value, { depth: -1 })
}
