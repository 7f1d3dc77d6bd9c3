import { hash } from 'node:crypto'
import { uuidOf } from '../util/uuid.js'

/**
 * The key under which a store keeps an operation, where there is no secret (with one, see `Hashes`). JSON frames scope and
 * key unambiguously, and escapes lone surrogates that would otherwise all hash alike.
 */
export function storageKey(scope: string | null, key: string): string {
  return hash('sha256', JSON.stringify([scope, key]), 'base64url')
}

/**
 * A UUID made of an operation's id and a label, with the version and variant bits of a version 4 UUID; and of the caller's
 * credentials, where no scope has made the storage keys of different callers different.
 */
export function deriveKey(id: string, label: string, credentials: string | null): string {
  const parts = credentials === null ? [id, label] : [id, label, credentials]
  return uuidOf(hash('sha256', JSON.stringify(parts), 'hex'))
}
