import swagger from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import idempotency, { openapiTransform } from '../../index.js'
import { startBrowser } from '../support/browser.js'
import { listening } from '../support/latch.js'

/* What a reader of the documentation sees, and that the documented request can be sent from it. SCREENSHOTS names a folder
   for pictures of it. */

const body = { type: 'object', required: ['amount'], properties: { amount: { type: 'integer', examples: [4200] } } }
const response = { 201: { type: 'object', properties: { id: { type: 'string' } } } }

for (const version of ['3.0.3', '3.1.0'])
  t.test(`Swagger UI shows a covered operation, and sends it, OpenAPI ${version}`, { timeout: 240_000 }, async (t) => {
    const app = Fastify() as unknown as FastifyInstance
    t.teardown(() => {
      app.server.closeAllConnections()
      return app.close()
    })
    const openapi = { openapi: version, info: { title: 'Payments', version: '1.0.0' } }
    await app.register(swagger, { openapi, transform: openapiTransform })
    await app.register(swaggerUi, { routePrefix: '/docs' })
    await app.register(idempotency, { required: true, keyFormat: 'uuid' })
    let runs = 0
    app.post(
      '/charges',
      { schema: { summary: 'Makes a charge', body, response }, config: { idempotency: true } },
      async (_request, reply) => reply.code(201).send({ id: `ch_${++runs}` })
    )
    const url = await listening(app)

    const browser = await startBrowser(t)
    const page = await browser.open()
    await page.resize(1280, 2400)
    await page.goto(`${url}/docs`)
    await page.click('.opblock-post .opblock-summary-control')
    const operation = '.opblock-post.is-open'
    await page.waitForElement(`${operation} .responses-table [data-code="422"]`)

    await t.test('the header, marked as required, with its format and what it is for', async (t) => {
      t.match(await page.text(`${operation} .opblock-description`), /retried/)
      const row = `${operation} tr[data-param-name="Idempotency-Key"][data-param-in="header"]`
      const shown = await page.text(row)
      t.match(shown, /Idempotency-Key\s\*/)
      t.match(shown, /\(header\)/)
      t.match(await page.text(`${row} .parameter__type`), /uuid/)
      t.equal(await page.evaluate(`document.querySelector('${row} .parameter__name.required') !== null`), true)
    })

    await t.test('the replies, each with its errors, and the headers that come with them', async (t) => {
      const reply = (status: number) => page.text(`${operation} .responses-table [data-code="${status}"]`)
      const codes = await page.evaluate<string[]>(
        `Array.from(document.querySelectorAll('${operation} .responses-table [data-code]'), (row) => row.dataset.code)`
      )
      t.same(codes, ['201', '400', '409', '422', '503'])
      t.match(await reply(201), /Idempotent-Replayed/)
      t.match(await reply(400), /FST_IDEMPOTENCY_KEY_MISSING/)
      t.match(await reply(409), /FST_IDEMPOTENCY_IN_PROGRESS/)
      t.match(await reply(409), /Retry-After/i)
      t.match(await reply(422), /FST_IDEMPOTENCY_KEY_REUSED/)
      t.match(await reply(503), /FST_IDEMPOTENCY_STORE_UNAVAILABLE/)
    })

    await t.test('nothing is reported as wrong with the document', async (t) => {
      t.equal(await page.evaluate("document.querySelector('.errors-wrapper')?.innerText ?? ''"), '')
    })

    if (process.env.SCREENSHOTS) await page.screenshot(`${process.env.SCREENSHOTS}/swagger-ui-${version}.png`)

    await t.test('"Try it out" wants the key, sends it, and shows the replay of what is sent again', async (t) => {
      await page.click(`${operation} .try-out__btn`)
      await page.click(`${operation} .execute`)
      const field = `${operation} tr[data-param-name="Idempotency-Key"] input`
      await page.waitForElement(`${field}.invalid`)
      t.equal(runs, 0, 'it is not sent without a key')
      await page.type(field, '8e03978e-40d5-43e8-bc93-6894a57f9324')
      await page.click(`${operation} .execute`)
      const live = `${operation} .live-responses-table`
      await page.waitFor(`document.querySelector('${live} .response .response-col_status')?.innerText.includes('201')`)
      t.notMatch(await page.text(live), /idempotent-replayed: true/)
      await page.click(`${operation} .execute`)
      await page.waitFor(`document.querySelector('${live}')?.innerText.includes('idempotent-replayed: true')`)
      t.match(await page.text(live), /ch_1/)
      t.equal(runs, 1)
      if (process.env.SCREENSHOTS) await page.screenshot(`${process.env.SCREENSHOTS}/swagger-ui-${version}-sent.png`)
    })
  })
