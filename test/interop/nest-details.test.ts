import 'reflect-metadata'
import type { ServerResponse } from 'node:http'
import {
  type CallHandler,
  type CanActivate,
  Controller,
  type ExecutionContext,
  ForbiddenException,
  HttpException,
  type MiddlewareConsumer,
  Module,
  type NestInterceptor,
  Post,
  Req,
  UseFilters,
  UseGuards,
  UseInterceptors
} from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication, RouteConfig } from '@nestjs/platform-fastify'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { map } from 'rxjs'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions, type IdempotencyRouteOptions } from '../../index.js'
import * as errors from '../../lib/errors.js'
import { codeOf } from '../support/app.js'
import { latch } from '../support/latch.js'
import { isReplay, post } from './kit.js'

/* What docs/nestjs.md says: what its pieces do to a first reply and to a replay, and its snippets. */

type Handle = (request: FastifyRequest) => unknown

interface Pieces {
  handle: Handle
  /** Those of the method, the lowest first. */
  decorators: MethodDecorator[]
  ofClass?: ClassDecorator[]
  providers?: (new () => object)[]
}

/** A module with one route, `POST /charges`. Decorators by hand, because TypeScript's own are not those that Nest has. */
function moduleOf({ handle, decorators, ofClass = [], providers = [] }: Pieces): new () => object {
  class Charges {
    create(request: FastifyRequest) {
      return handle(request)
    }
  }
  const { prototype } = Charges
  const create = Object.getOwnPropertyDescriptor(prototype, 'create') as PropertyDescriptor
  Req()(prototype, 'create', 0)
  for (const decorator of [Post('charges'), ...decorators]) decorator(prototype, 'create', create)
  for (const decorator of [Controller(), ...ofClass]) decorator(Charges)
  class AppModule {}
  Module({ controllers: [Charges], providers })(AppModule)
  return AppModule
}

/** Starts what is made of the pieces; what it gives sends a charge. */
async function serve(t: Test, pieces: Pieces, options: IdempotencyOptions = {}) {
  const app = await NestFactory.create<NestFastifyApplication>(moduleOf(pieces), new FastifyAdapter(), {
    logger: false
  })
  return { app, charge: await started(t, app, options) }
}

async function started(t: Test, app: NestFastifyApplication, options: IdempotencyOptions = {}) {
  t.teardown(() => app.close())
  await app.register(idempotency as never, options)
  await app.init()
  const fastify = app.getHttpAdapter().getInstance()
  await fastify.ready()
  return (key: string, payload: object = {}) => post(fastify as never, { url: '/charges', key, payload })
}

/** How often a handler has run. */
function counted() {
  const state = { runs: 0 }
  return { state, handle: () => ({ run: ++state.runs }) }
}

async function snippet<T>(name: string, given = {}): Promise<T> {
  const { run } = (await import(`../docs/snippets/deployment-nest-${name}.js`)) as { run(given: object): Promise<T> }
  return run(given)
}

type Idempotent = (options?: IdempotencyRouteOptions | true) => MethodDecorator
const { Idempotent } = await snippet<{ Idempotent: Idempotent }>('decorator')

t.test('Idempotent, the decorator of the page, covers a method, with what options it is given', async (t) => {
  const plain = await serve(t, { ...counted(), decorators: [Idempotent()] })
  t.notOk(isReplay(await plain.charge('k')))
  t.ok(isReplay(await plain.charge('k')))
  const named = await serve(t, { ...counted(), decorators: [Idempotent({ replayHeader: 'X-Replay' })] })
  await named.charge('k')
  t.equal((await named.charge('k')).headers['x-replay'], 'true')
})

t.test('Idempotent is for methods only, and takes no option that there is not', async () => {
  // @ts-expect-error
  Idempotent({ ttll: 1 })
  // @ts-expect-error
  Idempotent()(class {})
})

t.test('of two RouteConfigs on one method the upper one alone counts, which protects or does not', async (t) => {
  const other = RouteConfig({ rateLimit: {} })
  const { charge } = await serve(t, { ...counted(), decorators: [Idempotent(), other] })
  await charge('k')
  t.notOk(isReplay(await charge('k')), 'below another one')
  const upper = await serve(t, { ...counted(), decorators: [other, Idempotent()] })
  await upper.charge('k')
  t.ok(isReplay(await upper.charge('k')), 'above it')
})

t.test(
  'a RouteConfig of a controller is not seen by Nest; with `global` its routes are covered all the same',
  async (t) => {
    const pieces = () => ({ ...counted(), decorators: [], ofClass: [RouteConfig({ idempotency: true })] })
    for (const global of [false, true]) {
      const { charge } = await serve(t, pieces(), { global })
      await charge('k')
      t.equal(isReplay(await charge('k')), global)
    }
  }
)

t.test("a guard's 403 is stored by default, and not where shouldStore says below 400", async (t) => {
  for (const [options, replayed] of [
    [{}, true],
    [{ shouldStore: (_request: FastifyRequest, reply: FastifyReply) => reply.statusCode < 400 }, false]
  ] as const) {
    let allowed = false
    class Guard implements CanActivate {
      canActivate() {
        if (!allowed) throw new ForbiddenException()
        return true
      }
    }
    const decorators = [Idempotent(), UseGuards(Guard)]
    const { charge } = await serve(t, { ...counted(), decorators }, options)
    t.equal((await charge('k')).statusCode, 403)
    allowed = true
    const retry = await charge('k')
    t.same([retry.statusCode, isReplay(retry)], replayed ? [403, true] : [201, false])
  }
})

t.test("Nest's middleware sees replays, and may refuse them", async (t) => {
  let open = true
  const middleware = (_request: unknown, response: ServerResponse, next: () => void) => {
    if (open) return next()
    response.statusCode = 401
    response.end()
  }
  const AppModule = moduleOf({ ...counted(), decorators: [Idempotent()] })
  AppModule.prototype.configure = (consumer: MiddlewareConsumer) => {
    consumer.apply(middleware).forRoutes('charges')
  }
  const app = await NestFactory.create<NestFastifyApplication>(AppModule, new FastifyAdapter(), { logger: false })
  const charge = await started(t, app)
  await charge('k')
  t.ok(isReplay(await charge('k')))
  open = false
  const refused = await charge('k')
  t.same([refused.statusCode, isReplay(refused)], [401, false])
})

t.test('what an interceptor makes of a reply is stored, and a replay does not pass it', async (t) => {
  let passed = 0
  class Envelope implements NestInterceptor {
    intercept(_context: ExecutionContext, next: CallHandler) {
      passed++
      return next.handle().pipe(map((data) => ({ data })))
    }
  }
  const { charge } = await serve(t, { ...counted(), decorators: [Idempotent(), UseInterceptors(Envelope)] })
  const first = await charge('k')
  t.same(first.json(), { data: { run: 1 } })
  const replay = await charge('k')
  t.same([isReplay(replay), replay.body, passed], [true, first.body, 1])
})

t.test("what an exception filter replies is the handler's reply: final or not by its status", async (t) => {
  const caught: number[] = []
  class Filter {
    catch(error: HttpException, host: { getArgByIndex(index: 1): FastifyReply }) {
      caught.push(error.getStatus())
      host.getArgByIndex(1).code(error.getStatus()).send({ caught: caught.length })
    }
  }
  for (const [status, replayed] of [
    [402, true],
    [500, false]
  ] as const) {
    const handle = () => {
      throw new HttpException('no', status)
    }
    const { charge } = await serve(t, { handle, decorators: [Idempotent(), UseFilters(Filter)] })
    const first = await charge('k')
    const retry = await charge('k')
    t.same([first.statusCode, isReplay(retry)], [status, replayed])
  }
  t.same(caught, [402, 500, 500])
})

t.test(
  'CodedErrors, the filter of the page, hands on the codes of the plugin, and leaves all else as it is',
  async (t) => {
    const failures: Record<string, () => unknown> = {
      lost: () => new errors.ClaimLost(),
      other: () => new ForbiddenException('not you'),
      text: () => 'thrown'
    }
    const handle = (request: FastifyRequest) => {
      const failure = failures[(request.body as { fails?: string }).fails ?? '']
      if (failure !== undefined) throw failure()
      return 'done'
    }
    const AppModule = moduleOf({ handle, decorators: [Idempotent()] })
    const { app } = await snippet<{ app: NestFastifyApplication }>('codes', { AppModule })
    app.useLogger(false)
    const charge = await started(t, app)
    await charge('k')
    const reused = await charge('k', { another: 'body' })
    t.match(reused.json(), { statusCode: 422, code: 'FST_IDEMPOTENCY_KEY_REUSED', message: /already used/ })
    t.equal(reused.statusCode, 422)
    const lost = await charge('l', { fails: 'lost' })
    t.same([lost.statusCode, codeOf(lost)], [409, 'FST_IDEMPOTENCY_CLAIM_LOST'], 'an error that the handler throws')
    t.same((await charge('m', { fails: 'other' })).json(), {
      statusCode: 403,
      error: 'Forbidden',
      message: 'not you'
    })
    t.equal((await charge('n', { fails: 'text' })).statusCode, 500)
  }
)

t.test('a close waits for what runs behind onModuleDestroy, and before onApplicationShutdown', async (t) => {
  const order: string[] = []
  class Database {
    onModuleDestroy() {
      order.push('onModuleDestroy')
      leave.open()
    }
    onApplicationShutdown() {
      order.push('onApplicationShutdown')
    }
  }
  const [entered, leave] = [latch(), latch()]
  const handle = async () => {
    entered.open()
    await leave.promise
    return 'done'
  }
  const { app, charge } = await serve(t, { handle, decorators: [Idempotent()], providers: [Database] })
  const { store } = app.getHttpAdapter().getInstance().idempotency
  const { complete } = store
  store.complete = (...args) => {
    order.push('stored')
    return complete.apply(store, args)
  }
  const running = charge('k').then((reply) => reply.body)
  await entered.promise
  await app.close()
  t.equal(await running, 'done')
  t.same(order, ['onModuleDestroy', 'stored', 'onApplicationShutdown'])
})
