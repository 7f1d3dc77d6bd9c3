import { hash } from 'node:crypto'

/**
 * The key under which a store keeps an operation. JSON frames scope and key unambiguously, and escapes lone
 * surrogates that would otherwise all hash alike.
 */
export function storageKey(scope: string | null, key: string): string {
  return hash('sha256', JSON.stringify([scope, key]), 'base64url')
}

/**
 * A UUID made of the storage key and a label, with the version and variant bits of a version 4 UUID; and of the caller's
 * credentials, where no scope has made the storage keys of different callers different.
 */
export function deriveKey(storageKey: string, label: string, credentials: string | null): string {
  const parts = credentials === null ? [storageKey, label] : [storageKey, label, credentials]
  const hex = hash('sha256', JSON.stringify(parts), 'hex')
  const variant = ((Number.parseInt(hex.charAt(16), 16) & 0x3) | 0x8).toString(16)
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-${variant}${hex.slice(17, 20)}-${hex.slice(20, 32)}`
}
