import { createSecretKey, KeyObject } from 'node:crypto'
import type { IdempotencyStore } from '../types/index.js'
import { InvalidOption } from './errors.js'
import { type HashesInUse, KeyedHashes, PLAIN } from './operation/hashes.js'
import { describeSecret } from './util/describe.js'

/* The option `secret`: what it takes, what is made of it, and what does not go with several. No message shows one. */

const LEAST_BYTES = 32
const TAKES = `a secret of ${LEAST_BYTES} bytes or more (a text, bytes or a KeyObject), or a list of such secrets`

/**
 * The hashes of a registration.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function hashesOf(options: { readonly secret?: unknown }): HashesInUse {
  // What was to come from the environment, and is not there, must not be taken for none.
  if (!Object.hasOwn(options, 'secret')) return [PLAIN]
  const { secret: given } = options
  if (!Array.isArray(given)) return [new KeyedHashes(checkedSecret(given, 'got'))]
  const secrets = given.map((one, n) => (one === null ? null : checkedSecret(one, `secret[${n}] is`)))
  if (secrets.every((secret) => secret === null)) {
    throw new InvalidOption(`option "secret" takes ${TAKES}, got one without any`)
  }
  for (const [n, secret] of secrets.entries()) {
    if (secrets.slice(0, n).some((other) => isSame(other, secret))) {
      throw new InvalidOption(`option "secret" takes each secret once; secret[${n}] is there already`)
    }
  }
  return secrets.map((secret) => (secret === null ? PLAIN : new KeyedHashes(secret))) as unknown as HashesInUse
}

/**
 * Several secrets need a look before and after each claim, see `acquireAmong`.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function checkSeveral(store: IdempotencyStore, isTransactional: boolean, where: string): void {
  if (isTransactional) {
    throw new InvalidOption(
      `option "secret" takes several secrets for routes without "transaction"${where}: what an open transaction has claimed ` +
        'under one of them cannot be seen under another'
    )
  }
  if (store.get === undefined || store.delete === undefined) {
    const name = store.constructor?.name ?? 'object'
    throw new InvalidOption(
      `option "secret" takes several secrets for a store with get() and delete()${where}, got ${name}`
    )
  }
}

function checkedSecret(given: unknown, got: string): KeyObject {
  const secret = secretOf(given)
  if (secret === null) throw new InvalidOption(`option "secret" takes ${TAKES}, ${got} ${describeSecret(given)}`)
  return secret
}

/** The secret that somebody has given, in one of the forms in which it may be; `null` for none. */
function secretOf(given: unknown): KeyObject | null {
  // Of another type than 'secret' it has no size.
  if (given instanceof KeyObject) return (given.symmetricKeySize ?? 0) >= LEAST_BYTES ? given : null
  const bytes = typeof given === 'string' ? bytesOf(given) : given
  return bytes instanceof Uint8Array && bytes.length >= LEAST_BYTES ? createSecretKey(bytes) : null
}

/** As of the keys of an `EncryptedStore`, a text in hex or base64 is another form of its bytes. Any other stands for itself. */
function bytesOf(text: string): Buffer {
  if (/^(?:[0-9a-f]{2}){32,}$/i.test(text)) return Buffer.from(text, 'hex')
  if (/^[A-Za-z0-9+/_-]{43,}={0,2}$/.test(text)) return Buffer.from(text, 'base64')
  return Buffer.from(text)
}

function isSame(one: KeyObject | null, other: KeyObject | null): boolean {
  return one === null || other === null ? one === other : one.equals(other)
}
