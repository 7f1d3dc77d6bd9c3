import type { Acquisition, Claim, ListedKey, Settlement, StoredRecord, StoredStep } from '../../../types/index.js'
import { UnreadableAnswer } from '../../errors.js'
import { decodeRecord, encodeRecord, type RecordSummary, summaryOf } from '../record-codec.js'
import type { Keyring } from './sealing.js'

/*
 * What another store keeps of a claim or a record, sealed:
 *
 *   claim      its fingerprint
 *   step       its result
 *   reply      as fingerprint the base, which is JSON of [fingerprint, createdAt, status code]; as body the whole reply
 *   tombstone  as fingerprint the base, with the reason in the place of the status code; and the reason in the clear
 *
 * The base is what a list tells, where bodies are not at hand. It also stands for a reply of which the other store has made a
 * tombstone, because it was too large.
 */

const NOTHING = Buffer.alloc(0)
/** What a sealed reply looks like from outside, whatever is in it: a reply of no time. */
const OUTSIDE = { kind: 'reply', createdAt: 0, statusCode: 200, headers: [], text: false } as const

/** Seals what goes to a store, and opens what comes from it. */
export class Records {
  readonly #keyring: Keyring

  constructor(keyring: Keyring) {
    this.#keyring = keyring
  }

  sealedClaim<C extends Claim>(key: string, claim: C): C {
    const fingerprint = this.#seal(JSON.stringify(claim.fingerprint), aboutFingerprint(key))
    return { ...claim, fingerprint }
  }

  sealedStep(key: string, [name, result]: StoredStep): StoredStep {
    return [name, this.#seal(result, aboutStep(key, name))]
  }

  seal(key: string, record: StoredRecord): StoredRecord {
    const { fingerprint, createdAt, outcome } = summaryOf(record)
    const base = this.#seal(JSON.stringify([fingerprint, createdAt, outcome]), aboutBase(key))
    if (record.kind === 'tombstone') {
      return { kind: 'tombstone', reason: record.reason, fingerprint: base, createdAt: OUTSIDE.createdAt }
    }
    const body = this.#keyring.seal(encodeRecord(record, NOTHING), aboutRecord(key, base))
    return { ...OUTSIDE, fingerprint: base, headers: [], body }
  }

  sealedSettlement(key: string, settlement: Settlement): Settlement {
    return settlement === 'ended' ? settlement : { ...settlement, record: this.seal(key, settlement.record) }
  }

  /** @throws when it is not what was sealed for this key. */
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
        return { ...found, record: this.#openRecord(key, found.record) }
      default:
        return found
    }
  }

  /** The fingerprint of what nobody is running and has no reply, as it is kept and as it is; `null` for all else. */
  unsettled(key: string, found: Acquisition | null): { sealed: string; fingerprint: string } | null {
    if (found?.state === 'abandoned') {
      const { fingerprint: sealed } = found
      return { sealed, fingerprint: this.#openFingerprint(key, sealed) }
    }
    if (found?.state !== 'completed' || found.record.kind === 'reply') return null
    const { fingerprint: sealed } = found.record
    return { sealed, fingerprint: this.#openRecord(key, found.record).fingerprint }
  }

  /** `null` for what cannot be opened: it must not keep the rest from being seen. */
  openListed(listed: ListedKey): ListedKey | null {
    const { key, fingerprint } = listed
    try {
      if (listed.state === 'completed') return { ...listed, ...this.#openSummary(key, listed) }
      return { ...listed, fingerprint: this.#openFingerprint(key, fingerprint) }
    } catch (error) {
      if (error instanceof UnreadableAnswer) return null
      throw error
    }
  }

  #openClaim(key: string, { fingerprint, steps }: { fingerprint: string; steps?: readonly StoredStep[] }) {
    return { fingerprint: this.#openFingerprint(key, fingerprint), ...this.#openSteps(key, steps) }
  }

  #openSteps(key: string, steps?: readonly StoredStep[]): { steps?: StoredStep[] } {
    if (steps === undefined) return {}
    return { steps: steps.map(([name, sealed]) => [name, this.#open(sealed, aboutStep(key, name))]) }
  }

  #openRecord(key: string, record: StoredRecord): StoredRecord {
    if (record.kind === 'tombstone') {
      const { fingerprint, createdAt, outcome: reason } = this.#openSummary(key, summaryOf(record))
      return { kind: 'tombstone', reason: reason as typeof record.reason, fingerprint, createdAt }
    }
    // None of it is used: but what is not as it was written was written by somebody else.
    const { createdAt, statusCode, headers, text, body } = record
    if (createdAt !== OUTSIDE.createdAt || statusCode !== OUTSIDE.statusCode || headers.length > 0 || text) {
      throw damaged()
    }
    return decodeRecord(this.#keyring.open(body, aboutRecord(key, record.fingerprint)), 0)
  }

  /** What the base says; what stands beside it in the clear has to go with it. */
  #openSummary(key: string, { fingerprint: sealed, createdAt, outcome }: RecordSummary): RecordSummary {
    const base: unknown = JSON.parse(this.#open(sealed, aboutBase(key)))
    if (!Array.isArray(base) || base.length !== 3 || createdAt !== OUTSIDE.createdAt) throw damaged()
    const [fingerprint, madeAt, inside] = base as [string, number, RecordSummary['outcome']]
    const opened = { fingerprint, createdAt: madeAt, outcome: inside }
    // The one thing that the other store does to a record by itself.
    if (outcome === 'too-large') return { ...opened, outcome }
    const isReply = outcome === OUTSIDE.statusCode && typeof inside === 'number'
    if (!isReply && (typeof outcome === 'number' || outcome !== inside)) throw damaged()
    return opened
  }

  #openFingerprint(key: string, sealed: string): string {
    return JSON.parse(this.#open(sealed, aboutFingerprint(key)))
  }

  #seal(text: string, about: string): string {
    return this.#keyring.seal(Buffer.from(text), about).toString('base64url')
  }

  #open(sealed: string, about: string): string {
    return this.#keyring.open(Buffer.from(sealed, 'base64url'), about).toString()
  }
}

function damaged(): Error {
  return new UnreadableAnswer('A stored idempotency record is damaged')
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
