import {
  createCipheriv,
  createDecipheriv,
  createHmac,
  createSecretKey,
  hkdfSync,
  KeyObject,
  randomFillSync
} from 'node:crypto'
import { UnreadableAnswer } from '../../errors.js'

/*
 * What is sealed, as bytes: the version, four bytes that name the key, a random salt of 32, the ciphertext, and a tag of
 * 16. All that stands before the ciphertext is associatedData to it, like what the caller says it is about.
 *
 * Each has a key and a nonce of its own, by HKDF-SHA-256 (RFC 5869) of the secret and the salt, for AES-256-GCM. Under the
 * secret itself no more than 2^32 random nonces would be safe (NIST SP 800-38D §8.3): a busy service would be through with
 * them in weeks. XAES-256-GCM (https://c2sp.org/XAES-256-GCM) solves the same by two blocks of AES, in 10 µs where this takes
 * 14 to open a short record, and 15 where this takes 20 to seal it; but node:crypto has no such cipher, and the hand-made
 * CMAC under it would have been the one primitive here that nobody else looks after.
 */

const VERSION = 1
const NAME_AT = 1
const SALT_AT = 5
const SALT_BYTES = 32
const TEXT_AT = SALT_AT + SALT_BYTES
const TAG_BYTES = 16
const SECRET_BYTES = 32
const NONCE_BYTES = 12
const PURPOSE = 'fastify-idempotency record'

/** The secrets that open, of which the first one seals. */
export class Keyring {
  readonly #current: Secret
  readonly #byName = new Map<number, Secret[]>()

  constructor(keys: readonly KeyObject[]) {
    const secrets = keys.map((key) => new Secret(key))
    this.#current = secrets[0] as Secret
    for (const secret of secrets) {
      const namesakes = this.#byName.get(secret.name)
      if (namesakes) namesakes.push(secret)
      else this.#byName.set(secret.name, [secret])
    }
  }

  seal(plain: Buffer, about: string): Buffer {
    const head = Buffer.allocUnsafe(TEXT_AT)
    head[0] = VERSION
    head.writeUInt32BE(this.#current.name, NAME_AT)
    randomFillSync(head, SALT_AT)
    return Buffer.concat([head, ...this.#current.encrypt(plain, head.subarray(SALT_AT), associatedData(head, about))])
  }

  /** @throws when these are not the bytes that were sealed, about the same. */
  open(sealed: Buffer, about: string): Buffer {
    if (sealed.length < TEXT_AT + TAG_BYTES || sealed[0] !== VERSION) throw unsealable('is not encrypted, or damaged')
    const name = sealed.readUInt32BE(NAME_AT)
    const secrets = this.#byName.get(name)
    if (secrets === undefined) {
      throw unsealable(`was encrypted with a key that is not among the keys (its name is ${hex(name)}), or is damaged`)
    }
    const head = sealed.subarray(0, TEXT_AT)
    const end = sealed.length - TAG_BYTES
    for (const secret of secrets) {
      const plain = secret.decrypt(
        sealed.subarray(TEXT_AT, end),
        head.subarray(SALT_AT),
        associatedData(head, about),
        sealed.subarray(end)
      )
      if (plain !== null) return plain
    }
    throw unsealable('is damaged, or belongs to another key')
  }
}

/** One secret, with what is made of it. */
export class Secret {
  /** Tells secrets apart, and nothing of what they are. */
  readonly name: number
  readonly #key: KeyObject

  constructor(key: KeyObject) {
    this.#key = key
    this.name = createHmac('sha256', key).update('fastify-idempotency key name').digest().readUInt32BE()
  }

  encrypt(plain: Buffer, salt: Buffer, about: Buffer): Buffer[] {
    const cipher = createCipheriv('aes-256-gcm', ...this.#keyAndNonce(salt), { authTagLength: TAG_BYTES })
    cipher.setAAD(about)
    return [cipher.update(plain), cipher.final(), cipher.getAuthTag()]
  }

  decrypt(text: Buffer, salt: Buffer, about: Buffer, tag: Buffer): Buffer | null {
    const decipher = createDecipheriv('aes-256-gcm', ...this.#keyAndNonce(salt), { authTagLength: TAG_BYTES })
    decipher.setAAD(about)
    decipher.setAuthTag(tag)
    const plain = decipher.update(text)
    try {
      // Nothing follows, but the tag is looked at.
      decipher.final()
      return plain
    } catch {
      return null
    }
  }

  #keyAndNonce(salt: Buffer): [key: Buffer, nonce: Buffer] {
    const made = Buffer.from(hkdfSync('sha256', this.#key, salt, PURPOSE, SECRET_BYTES + NONCE_BYTES))
    return [made.subarray(0, SECRET_BYTES), made.subarray(SECRET_BYTES)]
  }
}

/** The version and the secret's name, and what the caller says. */
function associatedData(head: Buffer, about: string): Buffer {
  return Buffer.concat([head.subarray(0, SALT_AT), Buffer.from(about)])
}

/** The secret that somebody has given, in one of the forms in which it may be; `null` for none. */
export function secretOf(given: unknown): KeyObject | null {
  if (given instanceof KeyObject) return given.symmetricKeySize === SECRET_BYTES ? given : null
  const bytes = typeof given === 'string' ? bytesOf(given) : given
  return bytes instanceof Uint8Array && bytes.length === SECRET_BYTES ? createSecretKey(bytes) : null
}

function bytesOf(text: string): Buffer | null {
  if (/^[0-9a-f]{64}$/i.test(text)) return Buffer.from(text, 'hex')
  // 43 characters are 258 bits, of which the last two are none of the key's.
  if (/^[A-Za-z0-9+/_-]{43}=?$/.test(text)) return Buffer.from(text, 'base64')
  return null
}

function hex(name: number): string {
  return name.toString(16).padStart(8, '0')
}

function unsealable(what: string): Error {
  return new UnreadableAnswer(`A stored idempotency record or claim ${what}`)
}
