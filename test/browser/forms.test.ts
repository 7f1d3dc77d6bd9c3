import t from 'tap'
import { buildApp } from '../../examples/app.js'
import { type Page, startBrowser } from '../support/browser.js'
import { listening, until } from '../support/latch.js'
import { Shop, thanked } from './shop.js'

/* What people do to a form, in a browser. Each of it orders once, and without the plugin more often. */

type Manner = 'without JavaScript' | 'with JavaScript' | 'sent by fetch'

interface Scenario {
  name: string
  manners?: Manner[]
  act(page: Page, shop: Shop, manner: Manner): Promise<void>
}

const MANNERS: Manner[] = ['without JavaScript', 'with JavaScript', 'sent by fetch']

/**
 * Sends it several times, each time when the last one has arrived: what comes in less than that Chromium makes one
 * request of by itself.
 */
async function impatiently(times: number, page: Page, shop: Shop, send: () => Promise<void>): Promise<void> {
  const before = shop.arrived
  shop.hold()
  for (let count = 1; count <= times; count++) {
    await send()
    await shop.arrivals(before + count)
  }
  shop.goOn()
  await thanked(page)
}

async function clicking(times: number, page: Page, shop: Shop): Promise<void> {
  const button = await page.place('button')
  await impatiently(times, page, shop, () => page.click(button))
}

async function order(page: Page): Promise<void> {
  await page.navigated(() => page.click('button'))
  await thanked(page)
}

const scenarios: Scenario[] = [
  { name: 'a slow double click', act: (page, shop) => clicking(2, page, shop) },
  { name: 'impatient clicking', act: (page, shop) => clicking(5, page, shop) },
  {
    name: 'Enter, pressed twice',
    async act(page, shop) {
      await page.focus('[name=title]')
      await impatiently(2, page, shop, () => page.pressEnter())
    }
  },
  {
    name: 'back, and sent again, twice',
    async act(page) {
      await order(page)
      for (let count = 0; count < 2; count++) {
        await page.back()
        await order(page)
      }
    }
  },
  {
    name: 'a reload of what was posted, twice',
    // What a script fetches is not reloaded.
    manners: ['without JavaScript', 'with JavaScript'],
    async act(page, shop) {
      await order(page)
      for (const count of [2, 3]) {
        await page.reload()
        await thanked(page)
        await shop.arrivals(count)
      }
    }
  },
  {
    name: 'the form in two tabs, sent from both at once',
    async act(page, shop) {
      // A tab that is duplicated has the page from the cache, key and all.
      const other = await page.openTab()
      await other.goto(shop.url)
      const key = "document.querySelector('[name=__idempotent_key]').value"
      await other.evaluate(`${key} = ${JSON.stringify(await page.evaluate(key))}`)
      shop.hold()
      await Promise.all([page.click('button'), other.click('button')])
      await shop.arrivals(2)
      shop.goOn()
      await thanked(page)
      await thanked(other)
    }
  },
  {
    name: 'an answer that is lost, and another try',
    async act(page, shop, manner) {
      shop.cuts = 1
      if (manner === 'sent by fetch') {
        await page.click('button')
        const seen = await page.waitFor("document.body.dataset.failed ?? document.querySelector('#receipt')?.id")
        if (seen === 'yes') await page.click('button')
      } else {
        await page.navigated(() => page.click('button'))
        // Chromium itself sends it again when the connection is one that was used before.
        if (!(await page.evaluate("document.querySelector('#receipt') !== null"))) await page.reload()
      }
      await thanked(page)
      await shop.arrivals(2)
    }
  }
]

t.test('in Chromium', { timeout: 400_000 }, async (t) => {
  const browser = await startBrowser(t)

  for (const { name, manners = MANNERS, act } of scenarios)
    for (const manner of manners) {
      const visit = async (covered: boolean) => {
        const shop = new Shop()
        await shop.open(t, { covered, fetch: manner === 'sent by fetch' })
        const page = await browser.open({ javascript: manner !== 'without JavaScript' })
        await page.goto(shop.url)
        await act(page, shop, manner)
        return { shop, page }
      }

      t.test(`${name}, ${manner}, orders once, and a new form once more`, async (t) => {
        const { shop, page } = await visit(true)
        t.same(await shop.settled(), ['Dune'])
        t.ok(shop.arrived > 1, 'it was sent more than once')
        await page.goto(shop.url)
        await page.type('[name=title]', 'Emma')
        await order(page)
        t.same(await shop.settled(), ['Dune', 'Emma'])
      })

      t.test(`${name}, ${manner}, orders more than once where the plugin does not cover the route`, async (t) => {
        const { shop } = await visit(false)
        t.ok((await shop.settled()).length > 1)
      })
    }

  for (const javascript of [true, false])
    t.test(`the example orders once, whatever is done, ${javascript ? 'with' : 'without'} JavaScript`, async (t) => {
      const app = await buildApp()
      t.teardown(() => {
        app.server.closeAllConnections()
        return app.close()
      })
      let arrived = 0
      app.server.on('request', ({ method }) => {
        if (method === 'POST') arrived++
      })
      const url = `${await listening(app)}/form`
      const page = await browser.open({ javascript })
      const receipt = () => page.waitFor("location.pathname === '/orders/1' && document.querySelector('h1')?.innerText")

      await page.goto(url)
      await page.navigated(() => page.click('button', { times: 2 }))
      t.equal(await receipt(), 'Thank you')
      await page.reload()
      t.match(await page.text(), /Order 1: The Mythical Man-Month/)

      await page.back()
      t.equal(await page.evaluate('location.pathname'), '/form')
      const before = arrived
      await page.navigated(async () => {
        const button = await page.place('button')
        await page.click(button)
        await until(() => arrived > before, { message: 'it to be sent again' })
        await page.click(button)
      })
      await receipt()

      await page.navigated(() => page.click('a'))
      const listed = () => page.evaluate("Array.from(document.querySelectorAll('li'), (item) => item.innerText)")
      t.same(await listed(), ['The Mythical Man-Month'])
      await page.type('[name=title]', 'Emma')
      await page.navigated(() => page.click('button'))
      t.match(await page.text(), /Order 2: Emma/)
      await page.goto(url)
      t.same(await listed(), ['The Mythical Man-Month', 'Emma'])
    })
})
