import { hash } from 'node:crypto'

// What a value hash is made of: scalars as bytes, of which no two are written alike.

/** Characters of base64url: 128 bits are enough against a second preimage, and keep stored records small. */
const HASH_LENGTH = 22

export function digest(data: string | Uint8Array): string {
  return hash('sha256', data, 'base64url').slice(0, HASH_LENGTH)
}

/** What a writer keeps for the next value. More is a rare value's need. */
const USUAL_SIZE = 16_384

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

/** Writes scalars into a buffer that grows as it is needed, and is used again. */
export class ByteWriter {
  #bytes: Buffer = Buffer.allocUnsafeSlow(USUAL_SIZE)
  #at = 0

  /** Of all that was written. */
  digest(): string {
    return digest(this.#bytes.subarray(0, this.#at))
  }

  clear(): void {
    if (this.#bytes.length > USUAL_SIZE) this.#bytes = Buffer.allocUnsafeSlow(USUAL_SIZE)
    this.#at = 0
  }

  byte(byte: number): void {
    if (this.#at === this.#bytes.length) this.#grow(1)
    this.#bytes[this.#at++] = byte
  }

  number(value: number): void {
    if (this.#at + 9 > this.#bytes.length) this.#grow(9)
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
    if (this.#at + 2 + length > this.#bytes.length) this.#grow(2 + length)
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
    if (this.#at + 2 * value.length > this.#bytes.length) this.#grow(2 * value.length)
    this.#at += this.#bytes.write(value, this.#at, 'utf16le')
  }

  #grow(by: number): void {
    const larger = Buffer.allocUnsafeSlow(Math.max(this.#bytes.length * 2, this.#at + by))
    this.#bytes.copy(larger, 0, 0, this.#at)
    this.#bytes = larger
  }
}
