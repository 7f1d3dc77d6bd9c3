import { subscribe } from 'node:diagnostics_channel'
import type { FastifyInstance, RouteOptions } from 'fastify'

/** A route, and the instance on which it was declared. */
export interface DeclaredRoute {
  readonly instance: FastifyInstance
  readonly route: RouteOptions
}

// Fastify has no list of the routes that were declared before a plugin loaded. But it announces each new
// server, and from then on every route can be seen.
const declared = new WeakMap<object, DeclaredRoute[]>()

subscribe('fastify.initialization', (message) => {
  const { fastify } = message as { fastify: FastifyInstance }
  const routes: DeclaredRoute[] = []
  declared.set(fastify, routes)
  fastify.addHook('onRoute', function (route) {
    routes.push({ instance: this, route })
  })
})

/**
 * The routes declared so far on an instance and below it. None are known for a server that was made before
 * this module was loaded.
 */
export function routesDeclaredOn(instance: FastifyInstance): DeclaredRoute[] {
  for (let at: object | null = instance; at !== null; at = Object.getPrototypeOf(at)) {
    const routes = declared.get(at)
    if (routes !== undefined) {
      return routes.filter(
        (route) => route.instance === instance || Object.prototype.isPrototypeOf.call(instance, route.instance)
      )
    }
  }
  return []
}
