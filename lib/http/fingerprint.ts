import { inspect } from 'node:util'
import type { FastifyRequest } from 'fastify'
import { InvalidOption } from '../errors.js'
import { HINT_LENGTH } from '../operation/fingerprint.js'
import type { MaybePromise } from '../util/sync-promise.js'
import { digest } from './byte-writer.js'
import { isJson, isMultipart } from './content-type.js'
import { type FileLike, isPlain, isStream, OPAQUE } from './kinds-of-values.js'
import { formOf } from './multipart.js'
import { valueHash } from './value-hash.js'

/* What makes two requests the same: what they are for, who sends them, and their payload by value. */

/** What a payload's hash is made of starts with its kind, so that the kinds never meet. */
const NO_BODY = '-'

/** What the head of a route's requests is made of. */
export interface HeadRules {
  /** The route's URL pattern. */
  readonly route: string
  /** Of `constraintsOf`. */
  readonly constraints: string
  /** The option `target`: what the request is for, in place of all but its method. */
  readonly target: ((request: FastifyRequest) => string) | null
}

/** The head of the last request to a route that had neither parameters nor query. */
interface LastTarget {
  readonly method: string
  readonly host: string
  readonly target: string
}

const last = new WeakMap<HeadRules, LastTarget>()

/**
 * What is known before the body is, as Fastify has understood it: what it routes alike is alike. Before validation, which
 * may change parameters and query.
 * @param credentials `null` where a scope stands for them, or nobody has sent any.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION when `target` gives no string
 */
export function headOf(request: FastifyRequest, rules: HeadRules, credentials: string | null): string {
  const target = targetOf(request, rules)
  const head = credentials === null ? target : digest(JSON.stringify([target, credentials]))
  return head + target.slice(0, HINT_LENGTH)
}

function targetOf(request: FastifyRequest, rules: HeadRules): string {
  const { method } = request
  if (rules.target !== null) return digest(JSON.stringify([method, ownTarget(rules.target(request))]))
  const { host, params, query } = request
  if (!isEmpty(params) || !isEmpty(query)) return digest(targetText(request, rules))
  // One such request is mostly like the one before.
  const known = last.get(rules)
  if (known !== undefined && known.method === method && known.host === host) return known.target
  const target = digest(targetText(request, rules))
  last.set(rules, { method, host, target })
  return target
}

function targetText({ method, host, params, query, raw }: FastifyRequest, { route, constraints }: HeadRules): string {
  const values = [isEmpty(params) ? '' : byValue(params), isEmpty(query) ? '' : byValue(query)]
  // What a parser of its own has hidden can still be read where it was.
  const text = values.some((value) => value === null) ? raw.url : ''
  // RFC 3986 §3.2.2: hosts are the same in upper and lower case.
  return JSON.stringify([method, host.toLowerCase(), route, constraints, ...values, text])
}

function isEmpty(values: unknown): boolean {
  if (typeof values !== 'object' || values === null) return values === undefined || values === null
  for (const _ in values) return false
  return isPlain(values)
}

function ownTarget(target: unknown): string {
  if (typeof target === 'string') return target
  throw new InvalidOption(`option "target" must return a string, got ${typeof target}`)
}

/** The constraints that a route was declared with, as one text: the same in every process. */
export function constraintsOf(constraints: object | undefined): string {
  const values = Object.entries(constraints ?? {}).filter(([, value]) => value !== undefined)
  if (values.length === 0) return ''
  // What hides what is in it is at least described.
  return byValue(Object.fromEntries(values)) ?? inspect(constraints)
}

/**
 * The hash of what a user's function made of a request; empty for an empty result.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION for anything else, which would compare nothing and not say so.
 */
export function hashPayload(result: unknown): string {
  if (typeof result === 'string') return result === '' ? '' : digest(result)
  if (ArrayBuffer.isView(result)) {
    const bytes = new Uint8Array(result.buffer, result.byteOffset, result.byteLength)
    return bytes.length === 0 ? '' : digest(bytes)
  }
  throw new InvalidOption(`option "fingerprint" must return a string or a Buffer, got ${typeof result}`)
}

/**
 * The payload by value: parsed JSON and forms without regard to the order of members and white space, other bodies by
 * their bytes, multipart bodies by fields and file contents. Empty when the body is not at hand, as with a stream that
 * the handler reads itself, or hides what is in it.
 */
export function payloadOfBody(request: FastifyRequest): MaybePromise<string> {
  const body: unknown = request.body
  if (body === undefined || body === null) {
    if (!hasBody(request)) return digest(NO_BODY)
    return body === null && isJson(request) ? valueHash(null) : ''
  }
  if (typeof body === 'object') {
    if (isStream(body)) return ''
    if (isMultipart(request) && isPlain(body)) return formOf(body).then((form) => (form && byValue(form)) ?? '')
  }
  return withFiles(body)
}

/** `null` where a part of the value does not show what is in it. */
function byValue(value: unknown, files: FileLike[] | null = null): string | null {
  try {
    return valueHash(value, files)
  } catch (error) {
    if (error === OPAQUE) return null
    throw error
  }
}

/** The files of a form, or of what else a parser has made of the body, are read as well: that takes time. */
function withFiles(body: unknown): MaybePromise<string> {
  const files: FileLike[] = []
  const hash = byValue(body, files) ?? ''
  return files.length === 0 || hash === '' ? hash : withContent(hash, files)
}

async function withContent(hash: string, files: readonly FileLike[]): Promise<string> {
  const hashes = [hash]
  try {
    for (const file of files) hashes.push(digest(new Uint8Array(await file.arrayBuffer())))
  } catch {
    // Of a file on a disk, for instance, that has changed meanwhile.
    return ''
  }
  return digest(hashes.join())
}

/**
 * The hash of a value, for a `fingerprint` function that leaves out, or adds, a part of a request, as in
 * `const { sentAt, ...rest } = (request.body ?? {}) as Record<string, unknown>` and `return payloadFingerprint(rest)`: a
 * request may have no body. Equal values have the same hash, in whatever order the members of their objects are; the
 * order of arrays counts. Takes what JSON can say, and bytes, dates, maps, sets, form data and instances of classes by
 * what can be seen of them.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION for a value that hides what is in it, such as a `Blob`, a stream or a promise:
 * two of those would be taken for the same.
 */
export function payloadFingerprint(value: unknown): string {
  const hash = typeof value === 'object' && value !== null && isStream(value) ? null : byValue(value)
  if (hash !== null) return hash
  throw new InvalidOption('payloadFingerprint takes a value that shows what is in it; read files and streams first')
}

export function hasBody({ headers, raw }: FastifyRequest): boolean {
  const length = headers['content-length']
  if (headers['transfer-encoding'] !== undefined || (length !== undefined && length !== '0')) return true
  // HTTP/2 has neither of necessity.
  return (raw as { stream?: { endAfterHeaders?: boolean } })?.stream?.endAfterHeaders === false
}
