import type { FastifyInstance, RouteOptions } from 'fastify'
import type { IdempotencyOptions } from '../types/index.js'
import { AlreadyRegistered, InvalidOption } from './errors.js'
import { kExchange, kRefusal } from './http/exchange.js'
import { type FieldedRoute, warnOfForms } from './http/form-fields.js'
import { RouteHooks } from './http/hooks.js'
import { kSnapshot } from './http/request-snapshot.js'
import { InstanceApi } from './instance-api.js'
import { describeRoute, type Policy, registrationOptions, routePolicy } from './options.js'
import { globalsOf, kRegistration, Registration, registrationOf } from './registration.js'
import { expectCoverage, sees } from './routes/coverage.js'
import { cover } from './routes/covered-routes.js'
import { withoutSlash } from './routes/early-routes.js'
import { Runner } from './run.js'

/* Register time: what a registration decorates, which routes get which hooks, and where in their phases these stand. */

/** The configs of routes, and their URLs: the HEAD twin that Fastify adds to a route has the same ones. */
const seenUrls = new WeakMap<object, Set<string>>()

// Async, because what a plugin with a callback throws, Fastify does not catch.
export async function plugin(fastify: FastifyInstance, options: IdempotencyOptions): Promise<void> {
  // In a child of this instance a second registration is its own master, and inherits what is covered, who callers are, and the store.
  if (Object.hasOwn(fastify, kRegistration)) throw new AlreadyRegistered()
  const { supportedMethods } = fastify
  const registration = new Registration(registrationOptions(options, { supportedMethods, outer: globalsOf(fastify) }))
  const later = postponer()
  const fielded: FieldedRoute[] = []

  const { log } = fastify
  fastify.decorate('idempotency', new InstanceApi(registration, new Runner(registration, log), log))
  fastify.decorate(kRegistration, registration)
  decorateRequest(fastify)
  expectCoverage(fastify, registration)

  fastify.addHook('onRoute', function (route) {
    if (registrationOf(this) !== registration) return
    sees(registration, this, route)
    if (isHeadTwin(route)) return
    rememberUrl(route)
    const policy = routePolicy(route, registration.options)
    if (policy === null) return
    registration.cover(policy)
    cover(route, policy)
    if (policy.field !== null && policy.getKey === null) fielded.push({ instance: this, route: describeRoute(route) })
    const hooks = new RouteHooks(policy, registration)
    route.handler = hooks.wrap(route.handler as never)
    later(this, () => place(route, policy, hooks))
  })

  fastify.addHook('onReady', async () => {
    warnOfForms(fielded)
    // An outer registration that has come later: nobody has inherited it, and nobody is to miss it in silence.
    const outer = globalsOf(Object.getPrototypeOf(fastify))
    const { own, routeDefaults } = registration.options
    for (const name of ['scope', 'store'] as const) {
      if (outer?.[name] === undefined || own[name] !== undefined || outer[name] === routeDefaults[name]) continue
      throw new InvalidOption(
        `option "${name}" of an outer registration has come too late for the inner one: register it first`
      )
    }
  })

  fastify.addHook('preClose', (done) => {
    registration.startClosing()
    done()
  })

  fastify.addHook('onClose', async () => {
    await registration.close()
  })
}

/**
 * Puts the hooks of a covered route in their places: to the very end of their phases, and to the very beginning
 * of onSend. Called when all plugins' onRoute hooks have had their say, so that the order of registration does not matter.
 */
function place(route: RouteOptions, policy: Policy, hooks: RouteHooks): void {
  route.onRequest = last(route.onRequest, hooks.readHead)
  if (policy.hook === 'onRequest') route.onRequest = last(route.onRequest, hooks.reserve)
  if (policy.hook === 'preParsing') route.preParsing = last(route.preParsing, hooks.reserveInPreParsing)
  route.preValidation = last(route.preValidation, hooks.finishSnapshot)
  if (policy.hook === 'preValidation') route.preValidation = last(route.preValidation, hooks.reserve)
  route.preHandler = last(route.preHandler, hooks.claim)
  route.onSend = [hooks.onSend as never, ...list(route.onSend)]
  route.onError = last(route.onError, hooks.onError)
}

type Later = (instance: FastifyInstance, work: () => void) => void

/** Runs work when the plugin that is being loaded has declared its routes: once for all of them. */
function postponer(): Later {
  let postponed: (() => void)[] = []
  return (instance, work) => {
    postponed.push(work)
    if (postponed.length > 1) return
    // Without parameters, so that an error on its way to somebody else's callback is not taken for handled here.
    instance.after(() => {
      const due = postponed
      postponed = []
      for (const work of due) work()
    })
  }
}

/** A new array, because the user's own may serve several routes. */
function last<Hook>(hooks: Hook | Hook[] | undefined, hook: unknown): Hook[] {
  return [...list(hooks), hook as Hook]
}

function list<Hook>(hooks: Hook | Hook[] | undefined): Hook[] {
  if (hooks === undefined) return []
  return Array.isArray(hooks) ? hooks : [hooks]
}

function rememberUrl({ config, url }: RouteOptions): void {
  if (config === undefined) return
  const urls = seenUrls.get(config) ?? new Set()
  seenUrls.set(config, urls.add(withoutSlash(url)))
}

function isHeadTwin({ method, config, url }: RouteOptions): boolean {
  return method === 'HEAD' && config !== undefined && seenUrls.get(config)?.has(withoutSlash(url)) === true
}

function decorateRequest(fastify: FastifyInstance): void {
  for (const name of ['idempotency', kExchange, kRefusal, kSnapshot] as string[]) {
    if (!fastify.hasRequestDecorator(name)) fastify.decorateRequest(name, null as never)
  }
}
