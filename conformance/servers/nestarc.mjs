// @nestarc/idempotency 0.4.0, on NestJS 11 and Express.
// Set up as in its README: MemoryStorage or RedisStorage, the interceptor on the controller, @Idempotent() on its handlers ("Quick
// start"), and a `scope` of the caller, as in its example of several tenants. A scope of one's own takes the place of
// the default one, the endpoint, which is therefore part of it here ("Scope").

import 'reflect-metadata'
import { Readable } from 'node:stream'
import {
  IdempotencyInterceptor,
  IdempotencyModule,
  Idempotent,
  MemoryStorage,
  RedisStorage
} from '@nestarc/idempotency'
import {
  Controller,
  Get,
  Module,
  Post,
  Req,
  Res,
  StreamableFile,
  UnauthorizedException,
  UseGuards,
  UseInterceptors
} from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import { Redis } from 'ioredis'
import { host, listening, port, redisUrl, store } from '../listening.mjs'
import { callerOf, count, EXPIRING, LIFETIME_MS, PATHS, run } from '../payments.mjs'

class Authenticated {
  canActivate(context) {
    const request = context.switchToHttp().getRequest()
    request.user = callerOf(request.headers.authorization)
    if (request.user === undefined) throw new UnauthorizedException()
    return true
  }
}

class PaymentsController {
  executions() {
    return count()
  }
}
decorate(PaymentsController, 'executions', Get('executions'))
for (const path of PATHS) addRoute(path, {})
addRoute(EXPIRING, { ttl: LIFETIME_MS / 1_000 })
Controller()(PaymentsController)
UseGuards(Authenticated)(PaymentsController)
UseInterceptors(IdempotencyInterceptor)(PaymentsController)

/** As in TypeScript: @Post(path) @Idempotent(options) async [path](@Req() request, @Res({ passthrough: true }) response) { … } */
function addRoute(path, options) {
  const name = path.slice(1)
  PaymentsController.prototype[name] = async function handler(request, response) {
    const { status, headers, body } = await run(path, request.body)
    response.status(status).set(headers)
    if (Symbol.asyncIterator in body)
      return new StreamableFile(Readable.from(body, { objectMode: false }), { type: headers['content-type'] })
    if (Buffer.isBuffer(body)) return new StreamableFile(body)
    return body
  }
  Req()(PaymentsController.prototype, name, 0)
  Res({ passthrough: true })(PaymentsController.prototype, name, 1)
  decorate(PaymentsController, name, Post(name), Idempotent(options))
}

function decorate({ prototype }, name, ...decorators) {
  const descriptor = Object.getOwnPropertyDescriptor(prototype, name)
  for (const decorator of decorators) decorator(prototype, name, descriptor)
}

class AppModule {}
Module({
  imports: [
    IdempotencyModule.forRoot({
      storage: store === 'redis' ? new RedisStorage({ client: new Redis(redisUrl) }) : new MemoryStorage(),
      scope: (context) => {
        const request = context.switchToHttp().getRequest()
        return `${request.user} ${request.method} ${request.path}`
      }
    })
  ],
  controllers: [PaymentsController]
})(AppModule)

const app = await NestFactory.create(AppModule, { logger: ['error'] })
await app.listen(port, host)
listening(app.getHttpServer().address())
