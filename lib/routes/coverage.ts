import { isDeepStrictEqual } from 'node:util'
import type { FastifyInstance, RouteOptions } from 'fastify'
import { NotCovered, RouteTooEarly } from '../errors.js'
import { concerns, describeRoute, routePolicy } from '../options.js'
import { globalsOf, Registration, registrationOf } from '../registration.js'
import { warn } from '../warnings.js'
import { policyOf } from './covered-routes.js'
import {
  type DeclaredRoute,
  declaration,
  declaredRoutes,
  forEachNewServer,
  isAnnounced,
  serverOf,
  withoutSlash
} from './early-routes.js'

/* No route that asks for protection runs without it: at boot all routes are compared with what is covered. */

/** The registration that saw a route when it was declared, covered or not. */
const owners = new WeakMap<RouteOptions, Registration>()

/** What is known of a server that has a registration. */
interface Known {
  readonly registrations: Registration[]
  readonly seen: DeclaredRoute[]
}
const known = new WeakMap<FastifyInstance, Known>()

// Who imports the plugin and never registers it has forgotten it.
forEachNewServer(checkWhenReady)

/** A registration has come: the server will not get ready with a route that it should cover and does not. */
export function expectCoverage(instance: FastifyInstance, registration: Registration): void {
  const server = serverOf(instance)
  const before = known.get(server)
  if (before !== undefined) {
    before.registrations.push(registration)
    return
  }
  known.set(server, { registrations: [registration], seen: [] })
  if (!isAnnounced(server)) checkWhenReady(instance)
}

/** A registration sees a route. */
export function sees(registration: Registration, instance: FastifyInstance, route: RouteOptions): void {
  owners.set(route, registration)
  const server = serverOf(instance)
  if (!isAnnounced(server)) known.get(server)?.seen.push(declaration(instance, route))
}

function checkWhenReady(instance: FastifyInstance): void {
  instance.addHook('onReady', (done) => {
    const server = serverOf(instance)
    const declared = declaredRoutes(server)
    if (declared === null) warnOfUnseen(server)
    else {
      const { registrations, seen } = known.get(server) ?? { registrations: [], seen: [] }
      const routes = declared.map((route) => asSeen(route, seen))
      warnOfNames(routes)
      checkCoverage(routes, registrations)
    }
    done()
  })
}

/** @throws FST_IDEMPOTENCY_ROUTE_TOO_EARLY, FST_IDEMPOTENCY_NOT_COVERED, FST_IDEMPOTENCY_INVALID_OPTION */
function checkCoverage(routes: readonly DeclaredRoute[], registrations: readonly Registration[]): void {
  const early = new Set<string>()
  const outside = new Set<string>()
  const underAnother = new Set<string>()
  const changed = new Set<string>()
  // A plugin file without fastify-plugin: a registration that should cover every route, alone in its context.
  const alone = registrations.filter(
    (registration) => !routes.some(({ instance }) => registrationOf(instance) === registration)
  )
  for (const route of routes) {
    const inForce = registrationOf(route.instance)
    if (inForce === undefined) {
      const asks = asksByItself(route) || alone.some(({ options }) => concerns(route, options))
      if (asks && !isHeadTwin(route, routes)) outside.add(describeRoute(route))
    } else if (inForce instanceof Registration) {
      const owner = ownerOf(route)
      if (owner === inForce) {
        // An outer registration that has come after an inner one, which would have inherited from it.
        const globals = { ...inForce.options, ...globalsOf(route.instance) }
        if (concerns(route, globals) && !concerns(route, inForce.options)) early.add(describeRoute(route))
        else if (isChanged(route, routes, inForce)) changed.add(describeRoute(route))
        continue
      }
      const asks = concerns(route, inForce.options) || (owner !== undefined && concerns(route, owner.options))
      if (!asks || isHeadTwin(route, routes)) continue
      if (owner === undefined) early.add(describeRoute(route))
      else underAnother.add(describeRoute(route))
    }
  }
  const problems: string[] = []
  if (early.size > 0) {
    problems.push(
      `${were(early)} declared before fastify-idempotency had loaded, and would run unprotected: ` +
        'await app.register(idempotency, …) before the routes'
    )
  }
  if (outside.size > 0) {
    problems.push(
      `${are(outside)} to be idempotent, but no registration of fastify-idempotency is in force there: register it ` +
        'before the routes on their own instance or one above it. A plugin file that registers it for others needs fastify-plugin'
    )
  }
  if (underAnother.size > 0) {
    problems.push(
      `${were(underAnother)} declared before the registration of fastify-idempotency in their own context, and would run ` +
        'under the options of an outer one: await app.register(idempotency, …) before the routes of that context'
    )
  }
  if (changed.size > 0) {
    problems.push(
      `${are(changed)} to be idempotent, but config.idempotency was set after the registration of fastify-idempotency had ` +
        'seen it, and would not count: set it where the route is declared, or add the onRoute hook that sets it before ' +
        'the registration'
    )
  }
  if (problems.length > 0) throw new (early.size > 0 ? RouteTooEarly : NotCovered)(problems.join('. '))
}

const were = (routes: ReadonlySet<string>) => `${[...routes].join(', ')} ${routes.size === 1 ? 'was' : 'were'}`
const are = (routes: ReadonlySet<string>) => `${[...routes].join(', ')} ${routes.size === 1 ? 'is' : 'are'}`

function asksByItself({ config }: DeclaredRoute): boolean {
  return Boolean((config as { idempotency?: unknown }).idempotency)
}

/** Fastify adds one to a GET route, with what the route has: who asks is the GET route. */
function isHeadTwin({ method, url, instance, config }: DeclaredRoute, routes: readonly DeclaredRoute[]): boolean {
  if (method !== 'HEAD') return false
  const { idempotency } = config as { idempotency?: unknown }
  return routes.some(
    (other) =>
      other.instance === instance &&
      withoutSlash(other.url) === withoutSlash(url) &&
      [other.method].flat().includes('GET') &&
      (other.config as { idempotency?: unknown }).idempotency === idempotency
  )
}

/** A route as a registration has seen it, where only the router knows it by itself: its config may change to the end. */
function asSeen(route: DeclaredRoute, seen: readonly DeclaredRoute[]): DeclaredRoute {
  if (route.options !== null) return route
  // No two routes have the same URL, methods and constraints.
  const same = seen.find(
    ({ url, path, method, constraints }) =>
      (url === route.url || path === route.path) &&
      isDeepStrictEqual([method, constraints], [route.method, route.constraints])
  )
  return same ?? route
}

function ownerOf({ options }: DeclaredRoute): Registration | undefined {
  return options === null ? undefined : owners.get(options)
}

/**
 * Does a route ask for protection that had not when the registration saw it? Hooks that run after the registration's may
 * change its config, and so may anybody who has the object. Of a route that is covered the options count that it had then.
 */
function isChanged(route: DeclaredRoute, routes: readonly DeclaredRoute[], { options }: Registration): boolean {
  if (route.options === null || !concerns(route, options) || isHeadTwin(route, routes)) return false
  return policyOf(route.options) === undefined && routePolicy(route, options) !== null
}

const RESEMBLES = /i[mn]?d[ei][mn]?p[oa]t/i

/** A config, or an option beside it, that looks as if it should be ours protects nothing. */
function warnOfNames(routes: readonly DeclaredRoute[]): void {
  const mistaken = new Map<string, Set<string>>()
  for (const route of routes) {
    if (route.config !== undefined && Object.hasOwn(route.config, 'idempotency')) continue
    const inConfig = Object.keys(route.config ?? {}).map((name) => [name, `config.${name}`] as const)
    const beside = Object.keys(route.options ?? {}).map((name) => [name, `"${name}" beside config`] as const)
    const [, name] = [...inConfig, ...beside].find(([name]) => RESEMBLES.test(name)) ?? []
    if (name === undefined || isHeadTwin(route, routes)) continue
    mistaken.set(name, (mistaken.get(name) ?? new Set()).add(describeRoute(route)))
  }
  for (const [name, urls] of mistaken) {
    warn(
      'FST_IDEMPOTENCY_CONFIG_NAME',
      `${name} of ${[...urls].join(', ')} is not known to fastify-idempotency, and protects nothing: ` +
        'the name is config.idempotency'
    )
  }
}

function warnOfUnseen(server: FastifyInstance): void {
  warn(
    'FST_IDEMPOTENCY_UNSEEN_ROUTES',
    'fastify-idempotency was loaded after the server was made, and cannot see which of its routes were declared before: ' +
      `they would run unprotected. Import it before Fastify() is called.\n${server.printRoutes({ commonPrefix: false })}`
  )
}
