import { types } from 'node:util'
import { StepFailed } from '../errors.js'
import { describe } from '../util/describe.js'

/* The result of a step as text: what JSON makes of it, if JSON can keep it. */

const UNDEFINED = 'undefined'
/** In front of the reason why there is no result. JSON begins otherwise, and so does what stands in its place. */
const LOST = '!'
/** In the place of a result that was committed in a transaction, which the claim only knows of. */
export const IN_TRANSACTION = 'transaction'

/** Why a result cannot be kept. */
export class Unkeepable extends Error {}

/**
 * The text to keep of what a step has given.
 * @throws Unkeepable, with the place in the value
 */
export function encodeResult(value: unknown): string {
  // Of each container that JSON goes through, how one gets there from the result.
  const paths = new Map<unknown, string>()
  let path = ''
  // JSON calls it with the container as `this`; `shown` is what `toJSON` has made of the member.
  function keep(this: Record<string, unknown>, name: string, shown: unknown): unknown {
    const parent = paths.get(this)
    path = parent === undefined ? 'its result' : pathOf(parent, name, Array.isArray(this))
    if (shown === undefined && Array.isArray(this)) throw lossy(`${path} is undefined`)
    const loss = lossOf(this[name], shown)
    if (loss !== null) throw lossy(`${path} is ${loss}`)
    if (typeof shown === 'object' && shown !== null) paths.set(shown, path)
    return shown
  }
  try {
    return JSON.stringify(value, keep) ?? UNDEFINED
  } catch (error) {
    if (error instanceof Unkeepable) throw error
    const [reason] = (error as Error).message.split('\n')
    throw lossy(`${path} makes an error (${reason})`)
  }
}

/**
 * The text of what was done, or the reason why its result cannot be kept: whoever asks for it gets that, and nothing runs
 * again.
 * @param encode Throws Unkeepable, and nothing else.
 */
export function textOrReason(encode: () => string): string {
  try {
    return encode()
  } catch (error) {
    return LOST + (error as Unkeepable).message
  }
}

/**
 * What a step gives, of the text that was kept of it.
 * @throws FST_IDEMPOTENCY_STEP when it could not be kept
 */
export function decodeResult(name: string, text: string): unknown {
  if (text === UNDEFINED) return undefined
  if (text.startsWith(LOST)) throw new StepFailed(`the step "${name}" is done, but ${text.slice(LOST.length)}`)
  return JSON.parse(text)
}

function lossy(what: string): Unkeepable {
  return new Unkeepable(`${what}, which JSON cannot keep: return what it can, an id perhaps`)
}

/** What JSON would lose of a value without a word; `null` for nothing. */
function lossOf(given: unknown, shown: unknown): string | null {
  if (typeof shown === 'number' && !Number.isFinite(shown)) return String(shown)
  if (['bigint', 'function', 'symbol'].includes(typeof shown)) return `a ${typeof shown}`
  if (typeof given !== 'object' || given === null) return null
  if (types.isDate(given) && shown === null) return 'an invalid Date'
  // A Buffer would come back as an object of numbers.
  if (ArrayBuffer.isView(given) || given !== shown) return ArrayBuffer.isView(given) ? nameOf(given) : null
  const isMade = types.isMap(given) || types.isSet(given) || types.isNativeError(given) || types.isPromise(given)
  return isMade || isEmptied(given) ? nameOf(given) : null
}

/** Of an instance without members of its own, JSON would make `{}`. */
function isEmptied(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  if (Array.isArray(value) || types.isBoxedPrimitive(value) || prototype === null) return false
  // The prototype of the plain objects of any realm has none itself.
  return Object.getPrototypeOf(prototype) !== null && Object.keys(value).length === 0
}

function nameOf(value: object): string {
  const { name } = (value as { constructor?: { name?: unknown } }).constructor ?? {}
  return typeof name === 'string' && name !== '' ? `a value of type ${name}` : describe(value)
}

function pathOf(parent: string, name: string, isItem: boolean): string {
  if (isItem) return `${parent}[${name}]`
  return /^[\p{ID_Start}$_][\p{ID_Continue}$]*$/u.test(name)
    ? `${parent}.${name}`
    : `${parent}[${JSON.stringify(name)}]`
}
