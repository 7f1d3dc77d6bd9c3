import { createCipheriv, createDecipheriv, createHmac, createSecretKey, KeyObject, randomBytes } from 'node:crypto'
import { UnreadableAnswer } from '../errors.js'

/*
 * What is sealed, as bytes: the version, four bytes that name the key, a random nonce of 24, the ciphertext, and a tag
 * of 16. All that stands before the ciphertext is bound to it, like what the caller says it is about.
 *
 * The cipher is XAES-256-GCM (https://c2sp.org/XAES-256-GCM): AES-256-GCM under a key that is made of the secret and
 * the first half of the nonce. AES-256-GCM alone has nonces so short that no more than 2^32 of them may be random with
 * one secret (NIST SP 800-38D §8.3): a busy service would be through with it in weeks.
 */

const VERSION = 1
const NAME_AT = 1
const NONCE_AT = 5
const NONCE_BYTES = 24
const TEXT_AT = NONCE_AT + NONCE_BYTES
const TAG_BYTES = 16
const SECRET_BYTES = 32

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
    randomBytes(NONCE_BYTES).copy(head, NONCE_AT)
    return Buffer.concat([head, ...this.#current.encrypt(plain, head.subarray(NONCE_AT), bound(head, about))])
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
        head.subarray(NONCE_AT),
        bound(head, about),
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
  /** K1 of AES-CMAC (RFC 4493 §2.3). */
  readonly #k1: Buffer

  constructor(key: KeyObject) {
    this.#key = key
    this.name = createHmac('sha256', key).update('fastify-idempotency key name').digest().readUInt32BE()
    this.#k1 = doubled(this.#blocks(Buffer.alloc(16)))
  }

  encrypt(plain: Buffer, nonce: Buffer, about: Buffer): Buffer[] {
    const cipher = createCipheriv('aes-256-gcm', this.#keyFor(nonce), nonce.subarray(12), { authTagLength: TAG_BYTES })
    cipher.setAAD(about)
    return [cipher.update(plain), cipher.final(), cipher.getAuthTag()]
  }

  decrypt(text: Buffer, nonce: Buffer, about: Buffer, tag: Buffer): Buffer | null {
    const options = { authTagLength: TAG_BYTES }
    const decipher = createDecipheriv('aes-256-gcm', this.#keyFor(nonce), nonce.subarray(12), options)
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

  /** The two blocks of CMAC (NIST SP 800-108r1 §4.1) that make a key of the first half of a nonce. */
  #keyFor(nonce: Buffer): Buffer {
    const blocks = Buffer.alloc(32)
    for (const [n, at] of [
      [1, 0],
      [2, 16]
    ] as const) {
      blocks[at + 1] = n
      blocks[at + 2] = 0x58 // X
      nonce.copy(blocks, at + 4, 0, 12)
      for (let i = 0; i < 16; i++) blocks[at + i] = (blocks[at + i] as number) ^ (this.#k1[i] as number)
    }
    return this.#blocks(blocks)
  }

  /** Whole blocks only: padding would come with the end, which is never asked for. */
  #blocks(plain: Buffer): Buffer {
    return createCipheriv('aes-256-ecb', this.#key, null).update(plain)
  }
}

/** Twice the block, as a polynomial over GF(2) modulo x^128 + x^7 + x^2 + x + 1. */
function doubled(block: Buffer): Buffer {
  const twice = Buffer.alloc(16)
  for (let i = 0; i < 16; i++) twice[i] = ((block[i] as number) << 1) | ((block[i + 1] ?? 0) >> 7)
  if ((block[0] as number) & 0x80) twice[15] = (twice[15] as number) ^ 0x87
  return twice
}

/** The version and the secret's name, and what the caller says. */
function bound(head: Buffer, about: string): Buffer {
  return Buffer.concat([head.subarray(0, NONCE_AT), Buffer.from(about)])
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
