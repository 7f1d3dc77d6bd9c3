import { hash } from 'node:crypto'
import { types } from 'node:util'

/** Characters of base64url: 128 bits are enough against a second preimage, and keep stored records small. */
const HASH_LENGTH = 22

export function digest(data: string | Uint8Array): string {
  return hash('sha256', data, 'base64url').slice(0, HASH_LENGTH)
}

/** Thrown where a value hides what is in it: two of them can be equal to the eye, and not be the same. */
export const OPAQUE = Symbol('opaque')

/** What has to be waited for before its content is known. */
export interface FileLike {
  readonly name?: unknown
  readonly type: string
  arrayBuffer(): Promise<ArrayBuffer>
}

/**
 * The hash of a value: the same for equal values, in whatever order the members of their objects are, and only for those.
 * Files are put into `files` in the order in which they are met, because it takes time to read them: for their content
 * the hash does not stand.
 * @throws OPAQUE
 */
export function valueHash(value: unknown, files: FileLike[] | null = null): string {
  // A getter or `toJSON` of a value may ask for a hash of its own meanwhile.
  const writer = spare ?? new Writer()
  spare = null
  try {
    return writer.hash(value, files)
  } finally {
    spare = writer
  }
}

let spare: Writer | null = null

/** What a writer keeps for the next value. More is a rare value's need. */
const USUAL_SIZE = 16_384

/**
 * Above this number of containers somebody looks out for those that are met again and again, which costs more than all
 * the rest. A megabyte of JSON, Fastify's limit, has fewer.
 */
const SUSPICIOUS_COUNT = 524_288

/** Up to this length a string of ASCII is faster written here than by the engine. */
const SHORT = 96

/** Above this number of names insertion is slower than the engine's sort. */
const FEW_NAMES = 12

/** Names that have been put in order: those of the objects in an array mostly are the same each time. */
const MEMO_SIZE = 32

const number = new Float64Array(1)
const numberBytes = new Uint8Array(number.buffer)

// Each value starts with a byte that says what it is, and says where it ends: no two values are written alike.
const tag = (char: string) => char.charCodeAt(0)
const NULL = tag('n')
const UNDEFINED = tag('u')
const TRUE = tag('t')
const FALSE = tag('f')
const SMALL_NUMBER = tag('i')
const NUMBER = tag('d')
const STRING = tag('s')
const LONG_STRING = tag('l')
/** A big integer, function or symbol, as text. */
const OTHER_SCALAR = tag('o')
const BYTES = tag('#')
const DATE = tag('@')
const FILE = tag('F')
const CYCLE = tag('*')
const END = tag('.')
const ARRAY = tag('[')
const OBJECT = tag('{')
const MAP = tag('M')
const SET = tag('S')
const FORM = tag('&')
/** An object that shows what is in it by iteration, `toJSON` or `valueOf`. */
const SHOWN = tag('^')

type Members = Record<string, unknown>

/** One level of nesting: what is in it, the names of that in order (`null` where there are none), and what comes next. */
class Level {
  parent: Level | null = null
  items: readonly unknown[] | Members = []
  names: readonly string[] | null = null
  next = 0
  end = 0
  /** How many containers are over when this one is. */
  ends = 1
}

/**
 * Writes values as bytes. It does not recurse, and spends no more on any value than JSON.parse has spent on its text: how
 * deep or large a body is, is its client's choice.
 */
class Writer {
  #bytes: Buffer = Buffer.allocUnsafeSlow(USUAL_SIZE)
  #at = 0
  /** The innermost container that is being written. */
  #level: Level | null = null
  #depth = 0
  /** A level that is over, for the next one to use. */
  #spare: Level | null = null
  #opened = 0
  #met: Set<object> | null = null
  // A cycle repeats itself: one of those who are at 1, 2, 4, 8 … levels is met again (Brent 1980).
  #tortoise: object | null = null
  #tortoiseAt = 0
  #files: FileLike[] | null = null
  readonly #memo: { given: readonly string[]; sorted: readonly string[] }[] = []

  hash(value: unknown, files: FileLike[] | null): string {
    this.#files = files
    try {
      this.#write(value)
      return digest(this.#bytes.subarray(0, this.#at))
    } finally {
      this.#reset()
    }
  }

  #reset(): void {
    if (this.#bytes.length > USUAL_SIZE) this.#bytes = Buffer.allocUnsafeSlow(USUAL_SIZE)
    this.#at = 0
    this.#level = null
    this.#depth = 0
    this.#spare = null
    this.#opened = 0
    this.#met = null
    this.#tortoise = null
    this.#tortoiseAt = 0
    this.#files = null
    this.#memo.length = 0
  }

  #write(root: unknown): void {
    if (!this.#scalar(root)) this.#open(root as object)
    for (let level = this.#level; level !== null; level = this.#level) {
      if (!this.#goOn(level)) this.#close(level)
    }
  }

  /** Writes what comes next in a container; `false` at its end. */
  #goOn(level: Level): boolean {
    const { items, names, end } = level
    let { next } = level
    while (next < end) {
      let value: unknown
      if (names === null) {
        value = (items as readonly unknown[])[next++]
      } else {
        const name = names[next++] as string
        this.#string(name)
        value = (items as Record<string, unknown>)[name]
      }
      if (this.#scalar(value)) continue
      level.next = next
      if (this.#open(value as object)) return true
    }
    return false
  }

  /** Writes what has nothing in it; `false` for all else. */
  #scalar(value: unknown): boolean {
    switch (typeof value) {
      case 'string':
        this.#string(value)
        return true
      case 'number':
        this.#number(value)
        return true
      case 'object':
        if (value !== null) return false
        this.#byte(NULL)
        return true
      case 'boolean':
        this.#byte(value ? TRUE : FALSE)
        return true
      case 'undefined':
        this.#byte(UNDEFINED)
        return true
      default:
        this.#byte(OTHER_SCALAR)
        this.#string(typeof value)
        this.#string(String(value))
        return true
    }
  }

  /** Begins to write an object; `true` if there is something in it that is to be written next. */
  #open(value: object): boolean {
    if (Array.isArray(value)) {
      this.#byte(ARRAY)
      return this.#push(value, value, null)
    }
    if (!isPlain(value)) return this.#openOther(value)
    this.#byte(OBJECT)
    return this.#push(value, value as Members, this.#sorted(Object.keys(value)))
  }

  /** What no JSON gives: another parser does, or a hook. */
  #openOther(value: object): boolean {
    if (types.isDate(value)) {
      this.#byte(DATE)
      this.#number(value.getTime())
    } else if (ArrayBuffer.isView(value)) {
      this.#content(new Uint8Array(value.buffer, value.byteOffset, value.byteLength))
    } else if (types.isAnyArrayBuffer(value)) {
      this.#content(new Uint8Array(value))
    } else if (isFile(value)) {
      this.#file(value)
    } else {
      return this.#openContainer(value)
    }
    return false
  }

  #openContainer(value: object): boolean {
    if (isForm(value)) {
      this.#byte(FORM)
      const fields = grouped(value)
      return this.#push(value, fields, this.#sorted(Object.keys(fields)))
    }
    if (types.isMap(value)) {
      this.#byte(MAP)
      return this.#push(value, entriesOf(value), null)
    }
    if (types.isSet(value)) {
      this.#byte(SET)
      return this.#push(value, [...value], null)
    }
    if (isStream(value)) throw OPAQUE
    // An instance of a class: its members tell what it is, or what it shows of itself.
    const names = types.isBoxedPrimitive(value) ? [] : Object.keys(value)
    this.#byte(names.length > 0 ? OBJECT : SHOWN)
    return names.length > 0
      ? this.#push(value, value as Members, this.#sorted(names))
      : this.#push(value, shown(value), null)
  }

  #push(container: object, items: readonly unknown[] | Members, names: readonly string[] | null): boolean {
    const end = (names ?? (items as readonly unknown[])).length
    if (end === 0) {
      this.#byte(END)
      return false
    }
    if (container === this.#tortoise) {
      this.#byte(CYCLE)
      return false
    }
    if (++this.#opened > SUSPICIOUS_COUNT) {
      this.#met ??= new Set()
      if (this.#met.size === this.#met.add(container).size) throw OPAQUE
    }
    let level = this.#level
    if (level !== null && level.next === level.end) {
      // Where nothing else comes, both end together: what is in each other a million times needs one level.
      level.ends++
    } else {
      level = this.#spare ?? new Level()
      this.#spare = null
      level.parent = this.#level
      level.ends = 1
      this.#level = level
    }
    level.items = items
    level.names = names
    level.next = 0
    level.end = end
    if (++this.#depth >= 2 * this.#tortoiseAt) {
      this.#tortoise = container
      this.#tortoiseAt = this.#depth
    }
    return true
  }

  #close(level: Level): void {
    for (let i = 0; i < level.ends; i++) this.#byte(END)
    this.#depth -= level.ends
    if (this.#depth < this.#tortoiseAt) {
      this.#tortoise = null
      this.#tortoiseAt = this.#depth >> 1
    }
    this.#level = level.parent
    level.parent = null
    this.#spare = level
  }

  #file(file: FileLike): void {
    if (this.#files === null) throw OPAQUE
    this.#files.push(file)
    this.#byte(FILE)
    this.#scalar(file.name)
    this.#string(file.type)
  }

  #content(bytes: Uint8Array): void {
    this.#byte(BYTES)
    this.#string(digest(bytes))
  }

  #byte(byte: number): void {
    if (this.#at === this.#bytes.length) this.#grow(1)
    this.#bytes[this.#at++] = byte
  }

  #number(value: number): void {
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

  #string(value: string): void {
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
    this.#byte(LONG_STRING)
    this.#number(value.length)
    if (this.#at + 2 * value.length > this.#bytes.length) this.#grow(2 * value.length)
    this.#at += this.#bytes.write(value, this.#at, 'utf16le')
  }

  #grow(by: number): void {
    const larger = Buffer.allocUnsafeSlow(Math.max(this.#bytes.length * 2, this.#at + by))
    this.#bytes.copy(larger, 0, 0, this.#at)
    this.#bytes = larger
  }

  #sorted(names: string[]): readonly string[] {
    const { length } = names
    if (length < 2) return names
    const known = this.#memo[length % MEMO_SIZE]
    if (known !== undefined && isSame(known.given, names)) return known.sorted
    const sorted = sort(names.slice())
    this.#memo[length % MEMO_SIZE] = { given: names, sorted }
    return sorted
  }
}

function isSame(a: readonly string[], b: readonly string[]): boolean {
  if (a.length !== b.length) return false
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false
  return true
}

function sort(names: string[]): string[] {
  if (names.length > FEW_NAMES) return names.sort()
  for (let end = 1; end < names.length; end++) {
    const name = names[end] as string
    let at = end
    for (; at > 0 && (names[at - 1] as string) > name; at--) names[at] = names[at - 1] as string
    names[at] = name
  }
  return names
}

/** What JSON makes, and Fastify for parameters and queries. */
export function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return (
    (prototype === Object.prototype || prototype === null || Object.getPrototypeOf(prototype) === null) &&
    !(Symbol.iterator in value)
  )
}

/** Of whatever realm or package it is. No client's JSON has functions. */
function nameOf(value: object): unknown {
  return (value as { [Symbol.toStringTag]?: unknown })[Symbol.toStringTag]
}

function isFile(value: object): value is FileLike {
  const { arrayBuffer, type } = value as Partial<FileLike>
  return (
    typeof arrayBuffer === 'function' && typeof type === 'string' && ['Blob', 'File'].includes(nameOf(value) as string)
  )
}

type Form = Iterable<[string, unknown]>

function isForm(value: object): value is Form {
  return ['FormData', 'URLSearchParams'].includes(nameOf(value) as string) && Symbol.iterator in value
}

/** The values of each field: their order counts, that of the fields does not. */
function grouped(form: Form): Record<string, unknown[]> {
  const fields: Record<string, unknown[]> = Object.create(null)
  for (const [name, value] of form) {
    fields[name] ??= []
    fields[name].push(value)
  }
  return fields
}

/** With names for keys the order does not count: then a map is what others make an object of. */
function entriesOf(map: ReadonlyMap<unknown, unknown>): unknown[] {
  const entries = [...map]
  if (entries.every(([key]) => typeof key === 'string')) {
    entries.sort(([a], [b]) => ((a as string) < (b as string) ? -1 : 1))
  }
  return entries.flat(1)
}

/** A member of that name is not enough: what is in a JSON body, its client decides. */
export function isStream(value: object): boolean {
  const { pipe, getReader } = value as { pipe?: unknown; getReader?: unknown }
  return typeof pipe === 'function' || typeof getReader === 'function'
}

function shown(value: object): unknown[] {
  if (types.isBoxedPrimitive(value)) return [value.valueOf()]
  if (types.isRegExp(value)) return [String(value)]
  const { toJSON, [Symbol.iterator]: iterator } = value as { toJSON?: unknown; [Symbol.iterator]?: unknown }
  if (typeof toJSON === 'function') return [toJSON.call(value)]
  if (typeof iterator === 'function') return iterated(value as Iterable<unknown>)
  throw OPAQUE
}

/** Who can be asked only once is not asked: the handler wants to. */
function iterated(value: Iterable<unknown>): unknown[] {
  const iterator = value[Symbol.iterator]()
  if ((iterator as unknown) === value) throw OPAQUE
  const items: unknown[] = []
  for (let result = iterator.next(); result.done !== true; result = iterator.next()) {
    if (items.push(result.value) > SUSPICIOUS_COUNT) throw OPAQUE
  }
  return items
}
