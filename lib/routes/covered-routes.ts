import type { RouteOptions } from 'fastify'
import type { Policy } from '../options.js'

/* Which routes are covered, by which policy, for those who ask from outside. */

const policies = new WeakMap<RouteOptions, Policy>()

/** A route is covered by this policy, whatever registration it belongs to. */
export function cover(route: RouteOptions, policy: Policy): void {
  policies.set(route, policy)
}

/** The policy of a covered route. */
export function policyOf(route: RouteOptions): Policy | undefined {
  return policies.get(route)
}
