import { createHash, type Hash, hash } from 'node:crypto'

// What a value hash is made of: scalars as bytes, of which no two are written alike.

/** Characters of base64url: 128 bits are enough against a second preimage, and keep stored records small. */
const HASH_LENGTH = 22

export function digest(data: string | Uint8Array): string {
  return hash('sha256', data, 'base64url').slice(0, HASH_LENGTH)
}

/** Values that need more are hashed a part at a time: what they take does not grow with them. */
const SIZE = 16_384

/** Up to this length a string of ASCII is faster written here than by the engine. */
const SHORT = 96

const number = new Float64Array(1)
const numberBytes = new Uint8Array(number.buffer)

/** The byte that says what comes next. */
export const tag = (char: string): number => char.charCodeAt(0)
const SMALL_NUMBER = tag('i')
const NUMBER = tag('d')
const STRING = tag('s')
const LONG_STRING = tag('l')

/** Writes scalars into a buffer that is used again, and hashes them. */
export class ByteWriter {
  readonly #bytes: Buffer = Buffer.allocUnsafeSlow(SIZE)
  #at = 0
  /** Of what was written before that which is in the buffer; `null` for nothing. */
  #before: Hash | null = null

  /** Of all that was written. */
  digest(): string {
    const rest = this.#bytes.subarray(0, this.#at)
    if (this.#before === null) return digest(rest)
    return this.#before.update(rest).digest('base64url').slice(0, HASH_LENGTH)
  }

  clear(): void {
    this.#at = 0
    this.#before = null
  }

  byte(byte: number): void {
    if (this.#at === SIZE) this.#flush()
    this.#bytes[this.#at++] = byte
  }

  number(value: number): void {
    if (this.#at + 9 > SIZE) this.#flush()
    const bytes = this.#bytes
    if (value >= 0 && value < 256 && value === (value | 0)) {
      bytes[this.#at++] = SMALL_NUMBER
      bytes[this.#at++] = value
      return
    }
    number[0] = value
    bytes[this.#at++] = NUMBER
    for (let i = 0; i < 8; i++) bytes[this.#at++] = numberBytes[i] as number
  }

  string(value: string): void {
    const { length } = value
    if (length > SHORT) {
      this.#longString(value)
      return
    }
    if (this.#at + 2 + length > SIZE) this.#flush()
    const bytes = this.#bytes
    let at = this.#at
    bytes[at++] = STRING
    bytes[at++] = length
    for (let i = 0; i < length; i++) {
      const unit = value.charCodeAt(i)
      if (unit > 0x7f) {
        this.#longString(value)
        return
      }
      bytes[at++] = unit
    }
    this.#at = at
  }

  /** In UTF-16, because UTF-8 makes all lone surrogates alike. */
  #longString(value: string): void {
    this.byte(LONG_STRING)
    this.number(value.length)
    if (this.#at + 2 * value.length > SIZE) {
      const before = this.#flush()
      if (2 * value.length > SIZE) {
        before.update(Buffer.from(value, 'utf16le'))
        return
      }
    }
    this.#at += this.#bytes.write(value, this.#at, 'utf16le')
  }

  /** Empties the buffer. */
  #flush(): Hash {
    this.#before ??= createHash('sha256')
    this.#before.update(this.#bytes.subarray(0, this.#at))
    this.#at = 0
    return this.#before
  }
}
