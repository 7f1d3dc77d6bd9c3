import { isIP } from 'node:net'
import { isDeepStrictEqual } from 'node:util'
import { InvalidOption } from '../errors.js'
import { BOOLEAN, COUNT, checked, DURATION, isHeaderName, listOf, oneOf, type Rule, TEXT } from '../option-rules.js'
import { isObject } from './json-value.js'

/* What is said of an endpoint, so that it can be tried. */

/** Header lines: names and values. */
export type Headers = Readonly<Record<string, string>>

/** What is different in another kind of request to the same server. */
export interface Variant {
  /** Another path, or a whole URL. */
  readonly path?: string
  /** Added to the others. */
  readonly headers?: Headers
  /** Members of an object are laid over those of the profile's `body`; anything else replaces it. */
  readonly body?: unknown
}

/** How the server's keys look. */
export interface KeyProfile {
  /** The header that carries the key. Default: `'Idempotency-Key'`. */
  readonly header?: string
  /**
   * Which keys the endpoint takes. Default: `'any'`.
   * - `'any'`: any text that a header can carry; such as a UUID, with something added to it.
   * - `'uuid'`: UUIDs only.
   * - `'structured'`: quoted strings only (RFC 9651 §3.3.3), as the IETF draft has it.
   */
  readonly format?: 'any' | 'uuid' | 'structured'
  /** A request without a key is refused. Default: `false`. */
  readonly required?: boolean
  /** The longest key that the endpoint takes, in characters. Default: `255`. */
  readonly maxLength?: number
}

/** How executions are counted: one of three. */
export type Counter =
  /** What a URL (or a path) on the server answers to GET: a number, or JSON with the number at the `pointer` (RFC 6901). */
  | { readonly url: string; readonly pointer?: string; readonly headers?: Headers }
  /** What a command prints: a number. It is run by a shell. */
  | { readonly command: string }
  /** Members of the reply, as JSON Pointers, that are others in each execution, such as `'/id'`. */
  | { readonly reply: string | readonly string[] }

/** What is said of an endpoint. Every member is optional. */
export interface Profile {
  /** Default: `'POST'`. */
  readonly method?: string
  /** Added to the URL that is given. Default: none. */
  readonly path?: string
  /** Sent with each request. Default: `content-type: application/json`, where the body is JSON. */
  readonly headers?: Headers
  /** A payload that is accepted: sent as JSON, or, where it is a string, as it is. Default: `{ "amount": 100 }`. */
  readonly body?: unknown
  /** Another payload that is accepted, besides those in which one number or text of `body` is changed. */
  readonly otherBody?: unknown
  readonly key?: KeyProfile
  /** Headers of two callers that have nothing in common. The first one sends all requests but those about callers. */
  readonly callers?: readonly Headers[]
  /** Headers of somebody who is refused, in place of a caller's. Default: none where there are `callers`. */
  readonly anonymous?: Headers
  /** Default: the members that differ in the replies to two requests with different keys. */
  readonly count?: Counter
  /** What makes the endpoint take some time: 300 ms or more. */
  readonly slow?: Variant
  /** What makes the endpoint fail with a 5xx, after it has begun its work. */
  readonly fail?: Variant
  /** Another path whose requests look the same. */
  readonly otherPath?: string
  /** A request whose reply is not text. */
  readonly binary?: Variant
  /** A request whose reply is streamed. */
  readonly stream?: Variant
  /** A request whose reply is large. */
  readonly large?: Variant
  /** A request whose key expires soon, after `expiryMs`. Default: the ordinary request. */
  readonly expiring?: Variant
  /** After how many milliseconds the key of such a request has expired, where that can be waited for. */
  readonly expiryMs?: number | string
  /** The header that marks a replay. Default: whichever the replay has and the first reply has not. */
  readonly replayHeader?: string
  /** Where the endpoint's rules for keys are published: a path or a URL. */
  readonly documentation?: string
  /** How many duplicates are sent at once. Default: `10`. */
  readonly concurrency?: number
  /** Rules that the endpoint breaks deliberately, and where its documents say so. They count as declared, not as failed. */
  readonly declared?: Readonly<Record<string, string>>
}

/** A profile with everything said. */
export interface CompleteProfile extends Profile {
  readonly method: string
  readonly headers: Headers
  readonly body: unknown
  /** Other payloads than `body`, the likeliest to be accepted first. */
  readonly otherBodies: readonly unknown[]
  readonly key: Required<KeyProfile>
  readonly concurrency: number
  readonly expiryMs?: number
  readonly declared: Readonly<Record<string, string>>
}

const OBJECT: Rule = { takes: 'an object', accepts: isObject }
const HEADERS: Rule = {
  takes: 'an object of header names and texts',
  accepts: (value) =>
    isObject(value) && Object.entries(value).every(([name, text]) => isHeaderName(name) && typeof text === 'string')
}
const PAYLOAD: Rule = { takes: 'a value of JSON', accepts: (value) => value !== undefined }
const DECLARED: Rule = {
  takes: 'an object of rules and reasons',
  accepts: (value) => isObject(value) && Object.values(value).every((reason) => typeof reason === 'string')
}
const CALLERS: Rule = {
  takes: 'a list of the headers of two callers or more',
  accepts: (value) => Array.isArray(value) && value.length > 1 && listOf(HEADERS.accepts)(value)
}
const POINTER: Rule = {
  takes: "a JSON Pointer such as '/id'",
  accepts: (value) => typeof value === 'string' && /^(\/.*)?$/.test(value)
}
const POINTERS: Rule = {
  takes: "a JSON Pointer such as '/id', or a list of them",
  accepts: (value) => POINTER.accepts(value) || (Array.isArray(value) && value.every(POINTER.accepts))
}
const METHOD: Rule = {
  takes: 'a method such as POST',
  accepts: (value) => typeof value === 'string' && /^[A-Z-]+$/.test(value)
}

const PROFILE_RULES: { readonly [Name in keyof Profile]-?: Rule } = {
  method: METHOD,
  path: TEXT,
  headers: HEADERS,
  body: PAYLOAD,
  otherBody: PAYLOAD,
  key: OBJECT,
  callers: CALLERS,
  anonymous: HEADERS,
  count: OBJECT,
  slow: OBJECT,
  fail: OBJECT,
  otherPath: TEXT,
  binary: OBJECT,
  stream: OBJECT,
  large: OBJECT,
  expiring: OBJECT,
  expiryMs: DURATION,
  replayHeader: { takes: 'a header name', accepts: isHeaderName },
  documentation: TEXT,
  concurrency: { takes: 'an integer of 2 or more', accepts: (value) => COUNT.accepts(value) && Number(value) > 1 },
  declared: DECLARED
}
const VARIANT_RULES: { readonly [Name in keyof Variant]-?: Rule } = { path: TEXT, headers: HEADERS, body: PAYLOAD }
const KEY_RULES: { readonly [Name in keyof KeyProfile]-?: Rule } = {
  header: { takes: 'a header name', accepts: isHeaderName },
  format: oneOf('any', 'uuid', 'structured'),
  required: BOOLEAN,
  maxLength: COUNT
}

/**
 * Checks a profile, and says the rest.
 * @param ruleIds What `declared` may name.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION, which names the member
 */
export function completed(profile: Profile, ruleIds: readonly string[]): CompleteProfile {
  if (!isObject(profile)) throw new InvalidOption('A profile is an object of JSON')
  const owner = 'profile '
  const given = checked<Profile>(profile, PROFILE_RULES, { owner }) as Profile
  for (const name of ['slow', 'fail', 'binary', 'stream', 'large', 'expiring'] as const) {
    const variant = given[name]
    if (variant !== undefined) checked<Variant>(variant, VARIANT_RULES, { owner, where: ` of ${name}` })
  }
  const key = checked<KeyProfile>(given.key ?? {}, KEY_RULES, { owner, where: ' of key' }) as KeyProfile
  if (given.count !== undefined) checkCounter(given.count)
  for (const id of Object.keys(given.declared ?? {})) {
    if (!ruleIds.includes(id)) throw new InvalidOption(`profile option "declared": there is no rule "${id}"`)
  }
  const body = given.body ?? { amount: 100 }
  if (isDeepStrictEqual(given.otherBody, body))
    throw new InvalidOption('profile option "otherBody" is the same as "body"')
  if (given.callers !== undefined && isDeepStrictEqual(given.callers[0], given.callers[1])) {
    throw new InvalidOption('profile option "callers" has the same caller twice')
  }
  return {
    ...given,
    method: given.method ?? 'POST',
    headers: { ...(typeof body === 'string' ? {} : { 'content-type': 'application/json' }), ...given.headers },
    body,
    otherBodies: [...(given.otherBody === undefined ? [] : [given.otherBody]), ...othersThan(body)],
    key: { header: 'Idempotency-Key', format: 'any', required: false, maxLength: 255, ...key },
    concurrency: given.concurrency ?? 10,
    declared: given.declared ?? {}
  } as CompleteProfile
}

function checkCounter(count: Counter): void {
  const where = { owner: 'profile ', where: ' of count' }
  if ('url' in count) checked(count, { url: TEXT, pointer: POINTER, headers: HEADERS }, where)
  else if ('command' in count) checked(count, { command: TEXT }, where)
  else if ('reply' in count) checked(count, { reply: POINTERS }, where)
  else throw new InvalidOption('profile option "count" takes an object with "url", "command" or "reply"')
}

/** So many members are changed at most. */
const MOST_OTHERS = 8

/** The same payload with one number or text changed, each time another one. */
export function othersThan(body: unknown): unknown[] {
  if (typeof body === 'string') return [otherText(body)]
  return leavesOf(body)
    .slice(0, MOST_OTHERS)
    .map((leaf) => {
      const copy = structuredClone(body)
      const path = leaf.split('/').slice(1)
      const name = path.pop() as string
      const parent = path.reduce<Record<string, unknown>>((value, step) => value[step] as never, copy as never)
      const value = parent[name]
      parent[name] = typeof value === 'number' ? value + 1 : otherText(value as string)
      return copy
    })
}

/** A digit is changed where there is one: it is the likeliest to be accepted. */
function otherText(text: string): string {
  const digit = /\d(?=\D*$)/
  return digit.test(text) ? text.replace(digit, (found) => String((Number(found) + 1) % 10)) : `${text}x`
}

/** Where numbers and texts are, numbers first. */
function leavesOf(body: unknown): string[] {
  const found: Record<'number' | 'string', string[]> = { number: [], string: [] }
  const visit = (value: unknown, at: string) => {
    if (typeof value === 'number' || typeof value === 'string') found[typeof value as 'number'].push(at)
    else if (typeof value === 'object' && value !== null) {
      // A name with a slash is left alone: it could not be told from a path.
      for (const [name, member] of Object.entries(value)) if (!name.includes('/')) visit(member, `${at}/${name}`)
    }
  }
  visit(body, '')
  return [...found.number, ...found.string]
}

/** Where requests of a profile go, besides the URL that is given: paths or whole URLs. */
export function placesOf(profile: CompleteProfile): string[] {
  const { path, otherPath, documentation, count, slow, fail, binary, stream, large, expiring } = profile
  const variants = [slow, fail, binary, stream, large, expiring].map((variant) => variant?.path)
  const counter = count !== undefined && 'url' in count ? count.url : undefined
  return [path, otherPath, documentation, counter, ...variants].filter((place) => place !== undefined)
}

/** Is it a host of this machine alone? */
export function isLoopback(hostname: string): boolean {
  const host = hostname.replace(/^\[|\]$/g, '')
  if (isIP(host) === 4) return host.startsWith('127.')
  return host === '::1' || host === 'localhost' || host.endsWith('.localhost')
}
