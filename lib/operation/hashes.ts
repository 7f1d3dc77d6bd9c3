import { createHmac, createSecretKey, hkdfSync, type KeyObject } from 'node:crypto'
import { composeFingerprint, HASH_LENGTH, HINT_LENGTH } from './fingerprint.js'
import { MARK_LENGTH, markOf } from './origin.js'
import { storageKey } from './storage-key.js'

/*
 * All that a store sees of a key, of who sent it and of what came with it: hashes. Without a secret they are SHA-256, which
 * anybody can compute of a guess. Under a secret they are HMAC-SHA-256 (RFC 2104), and a guess can be tried by nobody who only
 * reads the store. Fingerprints are bound to their storage key as well: who may send requests, and reads the store, cannot
 * tell by a request of their own what came with another key.
 *
 * What is no part of a store is SHA-256 in any case: `deriveKey()` and the names of operations in tables of steps. They have to
 * be the same on every attempt, whatever the secret was then.
 */

export interface Hashes {
  /** The key under which a store keeps an operation. */
  storageKey(scope: string | null, key: string): string
  /** Tells whether a key is of a scope. Empty without one. */
  mark(storageKey: string, scope: string | null): string
  /** What a request looks like: made of hashes which need no secret, because they never leave the process. */
  fingerprint(storageKey: string, head: string, payload: string): string
}

/** Those of a registration: those of its secret, then those that it had before. */
export type HashesInUse = readonly [Hashes, ...Hashes[]]

/** Without a secret. */
export const PLAIN: Hashes = {
  storageKey,
  mark: markOf,
  fingerprint: (_, head, payload) => composeFingerprint(head, payload)
}

const SUBKEY_BYTES = 32
const PURPOSE = 'fastify-idempotency hashes'

/** Under a secret. */
export class KeyedHashes implements Hashes {
  /** Of the secret (HKDF, RFC 5869), which may have other uses, where others choose what is hashed under it. */
  readonly #key: KeyObject

  constructor(secret: KeyObject) {
    this.#key = createSecretKey(new Uint8Array(hkdfSync('sha256', secret, '', PURPOSE, SUBKEY_BYTES)))
  }

  storageKey(scope: string | null, key: string): string {
    return this.#hash('key', scope, key)
  }

  mark(storageKey: string, scope: string | null): string {
    return scope === null ? '' : this.#hash('caller', storageKey, scope).slice(0, MARK_LENGTH)
  }

  fingerprint(storageKey: string, head: string, payload: string): string {
    const of = (label: string, hashed: string) => this.#hash(label, storageKey, hashed)
    // Apart from the rest, because it is the same for all who ask for the same.
    const hint = of('hint', head.slice(-HINT_LENGTH)).slice(0, HINT_LENGTH)
    return composeFingerprint(
      of('head', head).slice(0, HASH_LENGTH) + hint,
      payload === '' ? '' : of('payload', payload).slice(0, HASH_LENGTH)
    )
  }

  // The label keeps what is hashed for one purpose apart from all others. JSON frames the parts unambiguously.

  #hash(...parts: readonly (string | null)[]): string {
    return createHmac('sha256', this.#key).update(JSON.stringify(parts)).digest('base64url')
  }
}
