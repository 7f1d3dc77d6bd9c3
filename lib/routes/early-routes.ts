import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { FastifyInstance, RouteOptions } from 'fastify'
import type { RouteDeclaration } from '../options.js'

/* Routes that were declared before the plugin could see them. */

/** A route, and the instance on which it was declared. */
export interface DeclaredRoute extends RouteDeclaration {
  readonly instance: FastifyInstance
  /** Where the router has it: an onRoute hook may have changed the URL. */
  readonly path: string
  readonly constraints: object
  /** What the onRoute hooks saw of it; `null` where only Fastify's router knows the route. */
  readonly options: RouteOptions | null
}

/** Every route of a server that was made after this module was loaded. */
const announced = new WeakMap<FastifyInstance, DeclaredRoute[]>()

const kListener: unique symbol = Symbol.for('fastify-idempotency.initialization') as never
const INITIALIZATION = 'fastify.initialization'
const initialization = channel(INITIALIZATION) as ReturnType<typeof channel> & {
  [kListener]?: (message: unknown) => void
}

/**
 * Calls back for each server that is made from now on, when nothing is on it yet. Fastify has no list of the routes that
 * were declared before a plugin loaded. But it announces each new server, and from then on every route can be seen.
 */
export function forEachNewServer(callback: (server: FastifyInstance) => void): void {
  // Jest loads every module anew for each test file of a process, and the channel outlives them all: the newest copy
  // takes the place of the one before, which would be kept with all that is in its world.
  if (initialization[kListener] !== undefined) unsubscribe(INITIALIZATION, initialization[kListener])
  initialization[kListener] = (message) => {
    const { fastify } = message as { fastify: FastifyInstance }
    // A server of another world, of the next test file that does not know the plugin for instance, is none of ours.
    if (Object.getPrototypeOf(fastify) !== Object.prototype) return
    const routes: DeclaredRoute[] = []
    announced.set(fastify, routes)
    fastify.addHook('onRoute', function (route) {
      routes.push(declaration(this, route))
    })
    callback(fastify)
  }
  subscribe(INITIALIZATION, initialization[kListener])
}

export function isAnnounced(server: FastifyInstance): boolean {
  return announced.has(server)
}

/** A route as an onRoute hook sees it, with what the hooks behind it may change. */
export function declaration(instance: FastifyInstance, options: RouteOptions): DeclaredRoute {
  return {
    instance,
    options,
    // Not later: the root of a prefix has two URLs in turn, and this is the one that Fastify names.
    url: options.url,
    get path() {
      return options.url
    },
    get method() {
      return options.method
    },
    get config() {
      return options.config ?? {}
    },
    get constraints() {
      return options.constraints ?? {}
    }
  }
}

/** All routes declared so far on a server, HEAD twins included; `null` when Fastify does not let them be seen. */
export function declaredRoutes(server: FastifyInstance): readonly DeclaredRoute[] | null {
  return announced.get(server) ?? routesOfRouter(server)
}

/** The server to which an instance belongs. */
export function serverOf(instance: FastifyInstance): FastifyInstance {
  let at = instance
  for (;;) {
    const above = Object.getPrototypeOf(at)
    // A server is a plain object, of whatever world it comes from.
    if (Object.getPrototypeOf(above) === null) return at
    at = above
  }
}

/** The root of a prefix has two URLs, each with a HEAD twin, and is one route. */
export function withoutSlash(url: string): string {
  return url.endsWith('/') ? url.slice(0, -1) : url
}

/** What Fastify keeps of a route in its router: the context of its requests. */
interface RouterRoute {
  readonly store: {
    readonly server: FastifyInstance
    readonly config: { readonly url: string; readonly method: string | string[] }
  }
  readonly path: string
  readonly opts: { readonly constraints: object }
}

/**
 * The routes of a server that was made before this module was loaded, as in a CommonJS application that requires the
 * plugin where it registers it. find-my-way shows every route to the `buildPrettyMeta` of the options that it prints
 * with, after it has put the router's own one there: this one stays.
 */
function routesOfRouter(server: FastifyInstance): DeclaredRoute[] | null {
  const routes = new Map<object, DeclaredRoute>()
  const show = ({ store, path, opts: { constraints } }: RouterRoute) => {
    const { url, method } = store.config
    routes.set(store, { instance: store.server, options: null, url, path, method, config: store.config, constraints })
    return {}
  }
  const options = Object.defineProperty({ includeMeta: [] }, 'buildPrettyMeta', { get: () => show, set: () => {} })
  try {
    const printed = server.printRoutes(options)
    return routes.size > 0 || printed === '(empty tree)' ? [...routes.values()] : null
  } catch {
    // A Fastify that keeps its routes otherwise.
    return null
  }
}
