import { UnauthorizedException } from '@nestjs/common'
import type { NestFastifyApplication } from '@nestjs/platform-fastify'
import idempotency from 'fastify-idempotency'
import { CodedErrors } from './coded-errors.filter'

declare module 'fastify' {
  interface FastifyRequest {
    /** Whose credentials came with the request. */
    account: string
  }
}

/** What the application is before its routes come, in tests too. */
export async function configure(app: NestFastifyApplication): Promise<void> {
  const fastify = app.getHttpAdapter().getInstance()

  // In a hook, because a guard is not asked before a replay.
  fastify.decorateRequest('account', '')
  fastify.addHook('onRequest', async (request) => {
    if (request.routeOptions.config.idempotency) request.account = accountOf(request.headers.authorization)
  })

  // In memory: with more than one process, a store that all of them share.
  await app.register(idempotency, {
    scope: (request) => request.account,
    // What a pipe, a guard or an exception filter refuses may be sent again, mended, with the same key.
    shouldStore: (_request, reply) => reply.statusCode < 400
  })

  CodedErrors.use(app)
}

/** A stand-in for the check of a token. */
function accountOf(authorization = ''): string {
  const [, account] = /^Bearer (\w+)$/.exec(authorization) ?? []
  if (account === undefined) throw new UnauthorizedException()
  return account
}
