import type { KeyFormat } from '../types/index.js'
import { parseKey } from './http/key.js'
import { PLAIN } from './operation/hashes.js'

/* A key that somebody names: an operator, a job, or who forgets its steps. */

/** The key, which may be pasted from a header, quotes and all. */
export function pastedKey(key: string, keyFormat: KeyFormat = 'any'): string {
  try {
    return parseKey(key, { keyFormat: keyFormat === 'uuid' ? 'uuid' : 'any', maxKeyLength: Number.POSITIVE_INFINITY })
  } catch {
    return key
  }
}

/** The storage key of an operation that somebody names; a `scope` option may have given a number. */
export function selectedKey(key: string, scope: unknown, keyFormat?: KeyFormat, hashes = PLAIN): string {
  return hashes.storageKey(scope === undefined ? null : String(scope), pastedKey(key, keyFormat))
}
