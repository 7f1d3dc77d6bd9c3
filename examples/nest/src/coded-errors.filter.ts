import { type ArgumentsHost, Catch, HttpException } from '@nestjs/common'
import { BaseExceptionFilter } from '@nestjs/core'
import type { NestFastifyApplication } from '@nestjs/platform-fastify'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'

const codes = new WeakMap<FastifyRequest, string>()

/** Sends the `code` of the plugin's errors, by which clients decide whether to come again. */
@Catch()
export class CodedErrors extends BaseExceptionFilter {
  static use(app: NestFastifyApplication): void {
    app.useGlobalFilters(new CodedErrors(app.getHttpAdapter()))
    // Nest 11 makes an HttpException of an error of Fastify, without its code.
    app
      .getHttpAdapter()
      .getInstance()
      .addHook('onError', async (request, _reply, { code }) => {
        codes.set(request, code)
      })
  }

  override catch(error: FastifyError | HttpException, host: ArgumentsHost) {
    const [request, reply] = host.getArgs<[FastifyRequest, FastifyReply]>()
    const code = codes.get(request) ?? (error as FastifyError | undefined)?.code
    if (!code?.startsWith('FST_IDEMPOTENCY_')) return super.catch(error, host)
    const statusCode = error instanceof HttpException ? error.getStatus() : error.statusCode
    reply.code(statusCode ?? 500).send({ statusCode, code, message: error.message })
  }
}
