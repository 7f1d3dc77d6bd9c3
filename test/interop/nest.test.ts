import 'reflect-metadata'
import {
  Body,
  type CanActivate,
  Controller,
  type ExecutionContext,
  Module,
  Post,
  UnauthorizedException,
  UseGuards,
  ValidationPipe
} from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication, RouteConfig } from '@nestjs/platform-fastify'
import { IsPositive } from 'class-validator'
import type { FastifyRequest } from 'fastify'
import t, { type Test } from 'tap'
import idempotency, { type IdempotencyOptions } from '../../index.js'
import { snippet } from '../readme/snippet.js'
import { isReplay, post } from './kit.js'

/* NestJS authenticates and validates inside of the handler: what a replay would pass by. */

/** Decorators by hand, because TypeScript's own are not those that Nest was made for. */
function charges() {
  const state = { runs: 0, revoked: new Set<string>() }

  class Guard implements CanActivate {
    canActivate(context: ExecutionContext): boolean {
      const { authorization = '' } = context.switchToHttp().getRequest<FastifyRequest>().headers
      if (!authorization.startsWith('of ') || state.revoked.has(authorization)) throw new UnauthorizedException()
      return true
    }
  }

  class Charge {
    amount = 0
  }
  IsPositive()(Charge.prototype, 'amount')

  class Charges {
    async create(charge: Charge) {
      return { run: ++state.runs, amount: charge.amount }
    }
  }
  const { prototype } = Charges
  const create = Object.getOwnPropertyDescriptor(prototype, 'create') as PropertyDescriptor
  Controller()(Charges)
  for (const decorator of [Post('charges'), UseGuards(Guard), RouteConfig({ idempotency: true })]) {
    decorator(prototype, 'create', create)
  }
  Body(new ValidationPipe({ expectedType: Charge }))(prototype, 'create', 0)

  class AppModule {}
  Module({ controllers: [Charges] })(AppModule)
  return { state, AppModule }
}

async function started(t: Test, app: NestFastifyApplication) {
  t.teardown(() => app.close())
  await app.init()
  const fastify = app.getHttpAdapter().getInstance()
  await fastify.ready()
  return (key: string, authorization: string | null, payload: object = { amount: 1 }) =>
    post(fastify as never, {
      url: '/charges',
      key,
      headers: authorization === null ? {} : { authorization },
      payload
    })
}

/** An application in which nobody but a guard authenticates. */
async function guarded(t: Test, options: IdempotencyOptions = {}) {
  const { state, AppModule } = charges()
  const app = await NestFactory.create<NestFastifyApplication>(AppModule, new FastifyAdapter(), { logger: false })
  await app.register(idempotency as never, options)
  return { state, charge: await started(t, app) }
}

async function recipe(t: Test) {
  const { state, AppModule } = charges()
  const accountOf = async (credentials: unknown) => {
    const account = String(credentials)
    if (!account.startsWith('of ') || state.revoked.has(account)) throw new UnauthorizedException()
    return account
  }
  const { app } = (await snippet('nest', { AppModule, accountOf })) as unknown as { app: NestFastifyApplication }
  return { state, charge: await started(t, app) }
}

t.test('with no option set, whoever a guard would refuse does not get the stored reply', async (t) => {
  const { charge } = await guarded(t)
  const first = await charge('k', 'of alice')
  t.equal(first.statusCode, 201)
  t.ok(isReplay(await charge('k', 'of alice')))
  for (const stranger of [null, 'expired', 'of bob']) {
    const reply = await charge('k', stranger)
    t.notOk(isReplay(reply))
    t.match(reply.json(), { statusCode: 422, message: /already used with another request/ }, String(stranger))
  }
})

t.test("a guard's 401 is not replayed: with good credentials the same key runs", async (t) => {
  const { charge } = await guarded(t, { scope: () => 'alice' })
  t.equal((await charge('k', 'expired')).statusCode, 401)
  const retry = await charge('k', 'of alice')
  t.equal(retry.statusCode, 201)
  t.notOk(isReplay(retry))
})

t.test('a missing, an expired, a revoked and a foreign credential, with the recipe of docs/nestjs.md', async (t) => {
  const { state, charge } = await recipe(t)
  t.equal((await charge('k', null)).statusCode, 401)
  t.equal((await charge('k', 'expired')).statusCode, 401)
  t.same((await charge('k', 'of alice')).json(), { run: 1, amount: 1 })
  t.ok(isReplay(await charge('k', 'of alice')))
  const foreign = await charge('k', 'of bob')
  t.same([isReplay(foreign), foreign.json()], [false, { run: 2, amount: 1 }])
  state.revoked.add('of alice')
  for (const nobody of [null, 'expired', 'of alice']) {
    const refused = await charge('k', nobody)
    t.same([refused.statusCode, isReplay(refused)], [401, false], String(nobody))
  }
})

t.test("a pipe's 400 is kept, with no option set: a mended body is another request", async (t) => {
  const { charge } = await guarded(t)
  t.equal((await charge('k', 'of alice', { amount: -1 })).statusCode, 400)
  t.ok(isReplay(await charge('k', 'of alice', { amount: -1 })))
  t.equal((await charge('k', 'of alice', { amount: 1 })).statusCode, 422)
})

t.test(
  "a pipe's 400 is not kept, with the recipe of docs/nestjs.md: a mended body runs under the same key",
  async (t) => {
    const { charge } = await recipe(t)
    t.equal((await charge('k', 'of alice', { amount: -1 })).statusCode, 400)
    const mended = await charge('k', 'of alice', { amount: 1 })
    t.same([mended.statusCode, isReplay(mended)], [201, false])
    t.ok(isReplay(await charge('k', 'of alice', { amount: 1 })))
  }
)
