import { METHODS } from 'node:http'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type {
  ClaimHook,
  IdempotencyOptions,
  IdempotencyRouteOptions,
  IdempotencyStore,
  RunOptions,
  StoredReply
} from '../types/index.js'
import { InvalidOption } from './errors.js'
import { blamed } from './http/blamed.js'
import { isFinal } from './http/finality.js'
import { constraintsOf } from './http/fingerprint.js'
import type { KeyRules } from './http/key.js'
import type { HashesInUse } from './operation/hashes.js'
import {
  ANYTHING,
  BOOLEAN,
  BYTES,
  type Checked,
  checked,
  DURATION,
  durationOrNull,
  FUNCTION,
  HEADER,
  isFunction,
  isHeaderName,
  listOf,
  oneOf,
  type Rule,
  SYNC_FUNCTION
} from './option-rules.js'
import { warnOfDurations } from './option-warnings.js'
import { checkSeveral, hashesOf } from './secret.js'
import { A_STORE, isStore } from './stores/is-store.js'
import { MemoryStore } from './stores/memory/memory-store.js'
import { describe } from './util/describe.js'

/*
 * The options, checked, with their defaults, as one frozen policy for each covered route. Nobody else reads raw
 * options.
 */

/** RFC 9110 §9.2.1, and RFC 10008 for QUERY: a request that changes nothing needs no protection. */
const SAFE_METHODS: ReadonlySet<string> = new Set(['GET', 'HEAD', 'OPTIONS', 'TRACE', 'QUERY'])

/** How long an unfinished claim is remembered where replies are kept for ever. */
const RETAIN_WITHOUT_TTL = 86_400_000

/** The options of one route, checked and complete. */
export interface Policy extends KeyRules {
  /** The route's URL pattern. */
  readonly route: string
  /** The methods of the route that are covered; `null` for all of them. */
  readonly methods: ReadonlySet<string> | null
  /** The header of the key as it was configured, for people; `null` for none. */
  readonly headerName: string | null
  readonly store: IdempotencyStore
  readonly skip: ((request: FastifyRequest) => boolean | Promise<boolean>) | null
  readonly getKey: ((request: FastifyRequest) => string | undefined | Promise<string | undefined>) | null
  readonly required: boolean
  readonly scope: ((request: FastifyRequest) => string | Promise<string>) | null
  /** Does the application say who the caller is? Otherwise credentials are compared. */
  readonly scoped: boolean
  readonly target: ((request: FastifyRequest) => string) | null
  /** The constraints of the route, as text. */
  readonly constraints: string
  readonly fingerprint: Exclude<IdempotencyRouteOptions['fingerprint'], undefined>
  readonly hook: ClaimHook
  readonly waits: boolean
  readonly waitTimeout: number
  readonly lease: number
  readonly reruns: boolean
  readonly transaction: boolean
  /** Are transactions of the handler's nested in it? */
  readonly nested: boolean
  readonly ttl: number | null
  readonly retain: number
  readonly shouldStore: (request: FastifyRequest, reply: FastifyReply) => boolean
  readonly redact: ((reply: StoredReply) => StoredReply) | null
  readonly maxReplySize: number
  readonly maxStepsSize: number
  readonly excludeHeaders: ReadonlySet<string>
  readonly replayHeader: string | null
  /** The same as it was configured, for people. */
  readonly replayHeaderName: string | null
  readonly bypasses: boolean
  readonly storeTimeout: number
  readonly problemDetails: boolean
  readonly documentationUrl: string | null
}

/** What a registration covers of the routes that say nothing. */
export interface Globals {
  readonly global: boolean
  readonly methods: ReadonlySet<string>
  /** Whoever registers again below may forget it, and its callers would get each other's replies. */
  readonly scope?: IdempotencyOptions['scope']
  /** The same: its keys would be in the memory of one process. */
  readonly store?: IdempotencyStore
}

/** The options of a route as they were checked. */
type RouteOptions = Checked<IdempotencyRouteOptions>

/** The options of one registration, checked. */
export interface RegistrationOptions extends Globals {
  /** What the registration says itself; the rest it inherits. */
  readonly own: Partial<Globals>
  /** Of the option `secret`. */
  readonly hashes: HashesInUse
  readonly routeDefaults: Readonly<RouteOptions> & { readonly store: IdempotencyStore }
}

const isListOfUnsafeMethods = listOf((value) => typeof value === 'string' && isUnsafeMethod(value.toUpperCase()))

const ROUTE_RULES: Record<keyof IdempotencyRouteOptions, Rule> = {
  store: { takes: A_STORE, accepts: isStore },
  skip: FUNCTION,
  header: HEADER,
  field: { takes: 'the name of a field', accepts: (value) => typeof value === 'string' && value !== '' },
  getKey: FUNCTION,
  keyFormat: {
    takes: "'any', 'uuid', 'structured' or a RegExp",
    accepts: (value) => value instanceof RegExp || ['any', 'uuid', 'structured'].includes(value as string)
  },
  maxKeyLength: BYTES,
  required: BOOLEAN,
  scope: { takes: 'a function, or false', accepts: (value) => value === false || isFunction(value) },
  target: SYNC_FUNCTION,
  fingerprint: {
    takes: 'true, false or a function',
    accepts: (value) => typeof value === 'boolean' || isFunction(value)
  },
  hook: oneOf('onRequest', 'preParsing', 'preValidation', 'preHandler'),
  onConflict: oneOf('reject', 'wait'),
  waitTimeout: DURATION,
  lease: DURATION,
  onAbandoned: oneOf('rerun', 'reject'),
  transaction: {
    takes: "true, false or 'nested'",
    accepts: (value) => typeof value === 'boolean' || value === 'nested'
  },
  ttl: durationOrNull('for ever'),
  shouldStore: SYNC_FUNCTION,
  redact: SYNC_FUNCTION,
  maxReplySize: BYTES,
  maxStepsSize: BYTES,
  excludeHeaders: { takes: 'an array of header names', accepts: listOf(isHeaderName) },
  replayHeader: HEADER,
  onStoreError: oneOf('reject', 'bypass'),
  storeTimeout: DURATION,
  problemDetails: BOOLEAN,
  documentationUrl: {
    takes: 'an absolute URL',
    accepts: (value) => typeof value === 'string' && URL.canParse(value) && !/[<>\s]/.test(value)
  }
}

export const REGISTRATION_RULES: Record<keyof IdempotencyOptions, Rule> = {
  ...ROUTE_RULES,
  global: BOOLEAN,
  methods: {
    takes: `an array of one or more methods that change something (not ${[...SAFE_METHODS].join(', ')})`,
    accepts: (value) => isListOfUnsafeMethods(value) && (value as unknown[]).length > 0
  },
  // By `hashesOf`, which does not show what was given.
  secret: ANYTHING
}

/**
 * What other tools hand to every plugin. `register` takes the first three for itself. fastify-cli gives the options of
 * its test helper (`skipOverride`), and with `--options` those of the server, to the application's plugin, which hands
 * them on by @fastify/autoload.
 */
const FOREIGN_OPTIONS: ReadonlySet<string> = new Set([
  ...['prefix', 'logLevel', 'logSerializers', 'skipOverride', 'encapsulate'],
  ...['ajv', 'allowErrorHandlerOverride', 'allowUnsafeRegex', 'bodyLimit', 'caseSensitive', 'childLoggerFactory'],
  ...['clientErrorHandler', 'connectionTimeout', 'constraints', 'disableRequestLogging', 'exposeHeadRoutes'],
  ...['forceCloseConnections', 'frameworkErrors', 'genReqId', 'handlerTimeout', 'http', 'http2', 'http2SessionTimeout'],
  ...['https', 'ignoreDuplicateSlashes', 'ignoreTrailingSlash', 'keepAliveTimeout', 'logController', 'logger'],
  ...['loggerInstance', 'maxParamLength', 'maxRequestsPerSocket', 'onConstructorPoisoning', 'onProtoPoisoning'],
  ...['pluginTimeout', 'querystringParser', 'requestIdHeader', 'requestIdLogLabel', 'requestTimeout'],
  ...['return503OnClosing', 'rewriteUrl', 'routerOptions', 'schemaController', 'schemaErrorFormatter'],
  ...['serializerOpts', 'serverFactory', 'trustProxy', 'useSemicolonDelimiter']
])

/** Where a registration takes place. */
interface Place {
  /** The methods that the server has routes for; without it, any will do. */
  readonly supportedMethods?: readonly string[]
  /** The nearest registration above. */
  readonly outer?: Globals | undefined
}

/**
 * Checks and copies the options of `app.register`.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function registrationOptions(
  options: IdempotencyOptions,
  { supportedMethods, outer }: Place = {}
): RegistrationOptions {
  const own = Object.fromEntries(Object.entries(options).filter(([name]) => !FOREIGN_OPTIONS.has(name)))
  const { global, methods, secret: _, ...route } = checked<IdempotencyOptions>(own, REGISTRATION_RULES)
  warnOfDurations(route, {}, '')
  const globals = {
    ...(global !== undefined && { global }),
    ...(methods !== undefined && { methods: new Set(methods.map((method) => method.toUpperCase())) }),
    ...(route.scope !== undefined && { scope: route.scope }),
    ...(route.store !== undefined && { store: route.store })
  }
  const { scope, store = new MemoryStore(), ...covered } = inherited(globals, outer)
  if (supportedMethods !== undefined) checkMethods(globals.methods, supportedMethods, methods)
  const hashes = hashesOf(own)
  if (hashes.length > 1) checkSeveral(store, false, '')
  return Object.freeze({
    ...covered,
    own: globals,
    hashes,
    routeDefaults: Object.freeze({ ...route, ...(scope !== undefined && { scope }), store })
  })
}

/** What a registration says of `global`, `methods`, `scope` and `store`, else the nearest one above, else the defaults. */
export function inherited(own: Partial<Globals>, outer: Globals | undefined): Globals {
  return { global: false, methods: new Set(['POST', 'PATCH']), ...outer, ...own }
}

/** A method that no route can have is misspelt, or comes before its `addHttpMethod`: it would cover nothing. */
function checkMethods(methods: ReadonlySet<string> = new Set(), supported: readonly string[], got: unknown): void {
  if ([...methods].every((method) => supported.includes(method))) return
  const known = supported.filter((method) => !SAFE_METHODS.has(method)).sort()
  throw new InvalidOption(
    `option "methods" takes methods that this server has: ${known.join(', ')} (and those of addHttpMethod, ` +
      `when it is called before), got ${describe(got)}`
  )
}

/** What `onRoute` tells of a route. */
export interface RouteDeclaration {
  readonly method: string | readonly string[]
  readonly url: string
  readonly config?: object
  readonly constraints?: object
}

/**
 * The policy of a route; `null` when it is not covered.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function routePolicy(route: RouteDeclaration, registration: RegistrationOptions): Policy | null {
  const config = (route.config as { idempotency?: unknown } | undefined)?.idempotency
  if (config === false || (config === undefined && !registration.global)) return null
  const where = ` of ${describeRoute(route)}`
  if (config !== undefined && config !== true && !isPlainObject(config)) {
    throw new InvalidOption(`config.idempotency${where} takes true, false or an object, got ${describe(config)}`)
  }
  const methods = typeof route.method === 'string' ? [route.method] : route.method
  const covered = methods.filter((method) =>
    config === undefined ? registration.methods.has(method) : !SAFE_METHODS.has(method)
  )
  if (covered.length === 0) {
    if (config === undefined) return null
    throw new InvalidOption(`config.idempotency${where} takes no route that has safe methods only`)
  }
  const own = isPlainObject(config) ? checked<IdempotencyRouteOptions>(config, ROUTE_RULES, { where }) : {}
  warnOfDurations(own, registration.routeDefaults, where)
  const options: RouteOptions = { ...registration.routeDefaults, ...own }
  if (options.target === undefined) checkConstraints(route.constraints, where)
  const policy = Object.freeze({
    route: route.url,
    constraints: constraintsOf(route.constraints),
    methods: covered.length === methods.length ? null : new Set(covered),
    ...complete(options, registration.routeDefaults.store, where)
  })
  if (registration.hashes.length > 1) checkSeveral(policy.store, policy.transaction, where)
  return policy
}

const { ttl, onConflict } = ROUTE_RULES
const RUN_RULES = { ttl, onConflict }

/**
 * The policy of an `app.idempotency.run`, which is no route.
 * @throws FST_IDEMPOTENCY_INVALID_OPTION
 */
export function runPolicy(
  options: Pick<RunOptions, 'ttl' | 'onConflict'>,
  { transaction, hook, header, redact, ...defaults }: RegistrationOptions['routeDefaults']
): Policy {
  const where = ' of run()'
  const own = checked<Pick<RunOptions, 'ttl' | 'onConflict'>>(options, RUN_RULES, { where })
  return { route: 'run', constraints: '', methods: null, ...complete({ ...defaults, ...own }, defaults.store, where) }
}

/**
 * A constraint of the application's own is compared as the route has it. Of one that matches by a pattern nobody can see
 * what it has matched, a tenant for instance. Versions and hosts are known otherwise.
 */
function checkConstraints(constraints: object = {}, where: string): void {
  for (const [name, value] of Object.entries(constraints)) {
    if (name === 'version' || name === 'host' || typeof value !== 'object' || value === null) continue
    throw new InvalidOption(
      `option "target"${where} is needed: its constraint "${name}" is a pattern, and requests that match it may be for different things`
    )
  }
}

/** Does the plugin cover such a route, or refuse it at least? */
export function concerns(route: RouteDeclaration, registration: RegistrationOptions): boolean {
  const config = (route.config as { idempotency?: unknown } | undefined)?.idempotency
  if (config !== undefined) return config !== false
  if (!registration.global) return false
  return [route.method].flat().some((method) => registration.methods.has(method))
}

export function describeRoute({ method, url }: RouteDeclaration): string {
  return `${[method].flat().join('|')} ${url}`
}

function complete(
  options: RouteOptions,
  store: IdempotencyStore,
  where: string
): Omit<Policy, 'route' | 'methods' | 'constraints'> {
  const { header = 'Idempotency-Key', replayHeader = 'Idempotent-Replayed', keyFormat = 'any' } = options
  const { ttl = 86_400_000, field, getKey, skip, target, fingerprint = true } = options
  if (header === false && field === undefined && getKey === undefined) {
    throw new InvalidOption(`option "header"${where} takes false only together with "field" or "getKey"`)
  }
  const { transaction = false } = options
  if (transaction) checkTransaction(options, options.store ?? store, where)
  return {
    store: options.store ?? store,
    skip: skip === undefined ? null : blamed('skip', skip),
    header: header === false ? null : header.toLowerCase(),
    headerName: header === false ? null : header,
    field: field ?? null,
    getKey: getKey === undefined ? null : blamed('getKey', getKey),
    keyFormat,
    maxKeyLength: options.maxKeyLength ?? 255,
    required: options.required ?? false,
    scope: options.scope || null,
    scoped: options.scope !== undefined,
    target: target === undefined ? null : blamed('target', target),
    fingerprint: typeof fingerprint === 'function' ? blamed('fingerprint', fingerprint) : fingerprint,
    hook: options.hook ?? 'preHandler',
    waits: options.onConflict === 'wait',
    waitTimeout: options.waitTimeout ?? 60_000,
    lease: options.lease ?? 30_000,
    reruns: options.onAbandoned !== 'reject',
    transaction: transaction !== false,
    nested: transaction === 'nested',
    ttl,
    retain: ttl ?? RETAIN_WITHOUT_TTL,
    shouldStore: options.shouldStore ?? isFinal,
    redact: options.redact ?? null,
    maxReplySize: options.maxReplySize ?? 1_048_576,
    maxStepsSize: options.maxStepsSize ?? 65_536,
    excludeHeaders: new Set(options.excludeHeaders?.map((name) => name.toLowerCase())),
    replayHeader: replayHeader === false ? null : replayHeader.toLowerCase(),
    replayHeaderName: replayHeader === false ? null : replayHeader,
    bypasses: options.onStoreError === 'bypass',
    storeTimeout: options.storeTimeout ?? 2_000,
    problemDetails: options.problemDetails ?? false,
    documentationUrl: options.documentationUrl ?? null
  }
}

function checkTransaction({ onStoreError, hook }: RouteOptions, store: IdempotencyStore, where: string): void {
  if (store.begin === undefined) {
    const name = store.constructor?.name ?? 'object'
    throw new InvalidOption(`option "transaction"${where} takes a store with transactions (PostgresStore), got ${name}`)
  }
  if (onStoreError === 'bypass') {
    throw new InvalidOption(`option "transaction"${where} takes no onStoreError 'bypass': its handler needs the store`)
  }
  if (hook !== undefined && hook !== 'preHandler') {
    const why = 'it would hold a connection while bodies are read'
    throw new InvalidOption(`option "transaction"${where} takes no hook '${hook}': ${why}`)
  }
}

// Methods that Fastify learns by `addHttpMethod` are not among Node's: anything that looks like one will do.
function isUnsafeMethod(method: string): boolean {
  return !SAFE_METHODS.has(method) && (METHODS.includes(method) || /^[A-Z][A-Z-]*$/.test(method))
}

function isPlainObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
