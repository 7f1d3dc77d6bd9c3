// express-idempotency 1.0.6, on Express 4, for which it was written.
// Set up as in its README: the middleware for all routes of POST after the body was parsed ("Getting started"), handlers
// that ask `isHit` ("Determine a idempotency hit in route handler") and report errors ("Report error in processing
// request"). It has no setting for a caller, a required key or a lifetime; its store is the default one.

import { Readable } from 'node:stream'
import express from 'express'
import { getSharedIdempotencyService, idempotency } from 'express-idempotency'
import { host, listening, port } from '../listening.mjs'
import { callerOf, count, PATHS, run } from '../payments.mjs'

const app = express()
app.use((request, response, next) => {
  if (callerOf(request.get('authorization')) === undefined) return response.status(401).json({ error: 'Unauthorized' })
  next()
})
app.use(express.json())
app.post('*', idempotency())

for (const path of PATHS) {
  app.post(path, async (request, response, next) => {
    const idempotencyService = getSharedIdempotencyService()
    if (idempotencyService.isHit(request)) return
    try {
      const { status, headers, body } = await run(path, request.body)
      response.status(status).set(headers)
      if (Symbol.asyncIterator in body) Readable.from(body).pipe(response)
      else response.send(body)
    } catch (error) {
      await idempotencyService.reportError(request)
      next(error)
    }
  })
}
app.get('/executions', (_request, response) => response.json(count()))

const server = app.listen(port, host, () => listening(server.address()))
