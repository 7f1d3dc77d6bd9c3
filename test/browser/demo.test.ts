import { createServer } from 'node:http'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { startDemo } from '../../examples/demo/demo.js'
import { Feed, type State } from '../../examples/demo/feed.js'
import { buildFront } from '../../examples/demo/front.js'
import type { ShopProcess } from '../../examples/demo/shop-process.js'
import { World } from '../../examples/demo/world.js'
import { readSettings } from '../../examples/settings.js'
import { type Page, startBrowser } from '../support/browser.js'
import { latch, listening, until } from '../support/latch.js'
import { makeFolder } from '../support/process.js'

/* What `npm start` shows, in a browser: each button, and what the timeline and the counters of both shops say then. */

type Side = 'with' | 'without'
const SIDES: Side[] = ['with', 'without']

interface Count {
  charged: string
  charges: number
  orders: number
  runs: number
  verdict: string
}

interface Scenario {
  button: string
  with: Count
  without: Count
  /** In the timeline of the covered shop, in this order, perhaps with others between. */
  events: string[]
  /** Not there at all. */
  never?: string[]
  /** The status of each reply of the covered shop, and which were replays. */
  replies: string[]
  says: RegExp
}

const RIGHT = 'Charged as ordered'
const once = { charged: '€42.00', charges: 1, orders: 1, runs: 1, verdict: RIGHT }
const twice = { charged: '€84.00', charges: 2, orders: 2, runs: 2, verdict: '€42.00 too much' }

const scenarios: Scenario[] = [
  {
    button: 'order',
    with: once,
    without: once,
    events: ['arrived', 'acquired', 'ran', 'charged', 'step-stored', 'parcel', 'step-stored', 'stored', 'replied'],
    replies: ['201'],
    says: /One order, one charge/
  },
  {
    button: 'double',
    with: once,
    without: twice,
    events: ['arrived', 'acquired', 'ran', 'stored', 'replayed'],
    replies: ['201', '201 replay'],
    says: /second click/
  },
  {
    button: 'five',
    with: once,
    without: { charged: '€210.00', charges: 5, orders: 5, runs: 5, verdict: '€168.00 too much' },
    events: ['acquired', 'ran', 'stored', 'replayed', 'replayed', 'replayed', 'replayed'],
    replies: ['201', '201 replay', '201 replay', '201 replay', '201 replay'],
    says: /five equal replies/
  },
  {
    button: 'cut',
    with: once,
    without: twice,
    events: ['arrived', 'acquired', 'ran', 'charged', 'hung-up', 'stored', 'replayed'],
    never: ['takeover'],
    replies: ['201 replay', '×'],
    says: /went on without its client/
  },
  {
    button: 'kill',
    with: { ...once, runs: 2 },
    without: { ...twice, orders: 1 },
    events: ['acquired', 'ran', 'charged', 'acquired', 'ran', 'payment-known', 'parcel', 'stored', 'replied'],
    replies: ['201', '502'],
    says: /attempt 2: it asked the provider with the same key/
  },
  {
    button: 'half',
    with: { ...once, runs: 2 },
    without: { ...twice, orders: 1 },
    events: ['charged', 'step-stored', 'parcel-failed', 'released', 'ran', 'step-resumed', 'parcel', 'stored'],
    never: ['payment-known'],
    replies: ['201', '503'],
    says: /behind the step that was done/
  },
  {
    button: 'amount',
    with: once,
    without: { charged: '€141.00', charges: 2, orders: 2, runs: 2, verdict: '€99.00 too much' },
    events: ['stored', 'replied', 'arrived', 'mismatch', 'replied'],
    never: ['replayed'],
    replies: ['201', '422'],
    says: /422, and the first reply stays/
  },
  {
    button: 'user',
    with: { ...twice, verdict: RIGHT },
    without: { ...twice, verdict: RIGHT },
    events: ['acquired', 'stored', 'acquired', 'stored'],
    never: ['replayed', 'mismatch'],
    replies: ['201', '201'],
    says: /not shown Alice’s/
  }
]

/** What a page shows. */
class Demo {
  readonly page: Page

  constructor(page: Page) {
    this.page = page
  }

  async idle(): Promise<void> {
    await this.page.waitFor(
      "['done', 'failed'].some((kind) => document.querySelector('#status').classList.contains(kind))"
    )
  }

  async play(button: string): Promise<string> {
    await this.page.click(`[data-play=${button}]`)
    await this.idle()
    return this.page.text('#status')
  }

  /** From now on what the status says is kept. */
  async watchStatus(): Promise<void> {
    await this.page.evaluate(`{
      window.said = []
      const status = document.querySelector('#status')
      new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true })
    }`)
  }

  said(): Promise<string[]> {
    return this.page.evaluate('window.said')
  }

  count(side: Side): Promise<Count> {
    return this.page.evaluate(`(() => {
      const section = document.querySelector('#${side}')
      const count = (name) => section.querySelector('[data-count=' + name + ']').textContent
      return {
        charged: count('charged'), charges: +count('charges'), orders: +count('orders'), runs: +count('runs'),
        verdict: section.querySelector('.verdict').textContent
      }
    })()`)
  }

  /** The last reply that it waits for is told of on another connection than the reply itself came on. */
  async counts(t: Test, side: Side, expected: Count): Promise<void> {
    let found: Count | undefined
    const isThere = async () => {
      found = await this.count(side)
      return JSON.stringify(found) === JSON.stringify(expected)
    }
    await until(isThere, { timeout: 60_000 }).catch(() => {})
    t.same(found, expected, `the counters ${side} the plugin`)
  }

  events(side: Side): Promise<string[]> {
    return this.page.evaluate(
      `Array.from(document.querySelectorAll('#log [data-side=${side}]'), (item) => item.dataset.what)`
    )
  }

  replies(side: Side): Promise<string[]> {
    return this.page.evaluate(`Array.from(document.querySelectorAll('#${side} .replies li:not(.empty)'), (item) =>
      item.querySelector('b').textContent + (item.querySelector('i') ? ' replay' : ''))`)
  }
}

/** Are these in the list, in this order? */
function follow(list: string[], expected: string[]): boolean {
  let from = 0
  return expected.every((name) => {
    from = list.indexOf(name, from) + 1
    return from > 0
  })
}

/** The least contrast of what is written, against what is behind it; but for what is switched off. */
const LEAST_CONTRAST = `(() => {
  const parse = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number)
  const light = ([r, g, b]) => [r, g, b]
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0)
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor)
      if ((color[3] ?? 1) === 1) return color
    }
    return [255, 255, 255]
  }
  const found = []
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('[aria-disabled=true]')) continue
    const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(light).sort((a, b) => b - a)
    found.push({ text: walker.currentNode.data.trim(), contrast: (a + 0.05) / (b + 0.05) })
  }
  return found.sort((a, b) => a.contrast - b.contrast)[0]
})()`

/** What is wider than its place. */
const STICKING_OUT = `Array.from(document.body.querySelectorAll('*'))
  .filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0 && getComputedStyle(one).overflowX === 'visible')
  .map((one) => one.outerHTML.slice(0, 200))`

t.test('whoever left while the shop was starting has nothing ordered', async (t) => {
  const arrived: (string | undefined)[] = []
  const upstream = createServer((request, response) => {
    arrived.push(request.url)
    response.end()
  })
  const port = await new Promise<number>((resolve) =>
    upstream.listen(0, '127.0.0.1', () => resolve((upstream.address() as { port: number }).port))
  )
  const started = latch<number>()
  const feed = new Feed(() => ({}) as State)
  const front = buildFront({ shop: { port: started.promise } as ShopProcess, world: new World(feed), feed })
  t.teardown(() => Promise.all([front.close(), new Promise((resolve) => upstream.close(resolve))]))
  const hungUp = latch()
  front.server.once('request', (_request, response) => response.once('close', () => hungUp.open()))
  const url = await listening(front)

  const client = new AbortController()
  const lost = fetch(`${url}/left`, { method: 'POST', signal: client.signal })
  front.server.once('request', () => client.abort())
  await t.rejects(lost, { name: 'AbortError' })
  await hungUp.promise
  started.open(port)
  t.equal((await fetch(`${url}/stayed`, { method: 'POST' })).status, 200)
  t.same(arrived, ['/stayed'])
})

t.test('the demo in Chromium', { timeout: 900_000 }, async (t) => {
  const start = async (databaseUrl: string) => {
    const where = { host: '127.0.0.1', port: 0, onSlowMachine: true }
    const demo = await startDemo(readSettings({ DATABASE_URL: databaseUrl }), where)
    t.teardown(() => demo.close())
    return demo.url
  }
  const url = await start(`sqlite:${join(makeFolder('demo'), 'file')}`)
  const browser = await startBrowser(t)

  const pages: Page[] = []
  /** A page that nothing has happened on. */
  const visit = async (at = url) => {
    await fetch(`${at}/demo/reset`, { method: 'POST' })
    const page = await browser.open()
    await page.watchScripts()
    await page.resize(1280, 1000)
    await page.goto(at)
    await page.waitFor("document.querySelector('#shop-chip').textContent.includes('process')")
    pages.push(page)
    return new Demo(page)
  }

  /** The provider answers nothing, until it goes on. */
  const hold = () =>
    fetch(`${url}/demo/next`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ holdPayments: true })
    })
  const go = () => fetch(`${url}/demo/go`, { method: 'POST' })

  for (const { button, events, never = [], replies, says, ...counts } of scenarios)
    t.test(`the button "${button}"`, async (t) => {
      const demo = await visit()
      t.match(await demo.play(button), says)
      for (const side of SIDES) await demo.counts(t, side, counts[side])
      const told = await demo.events('with')
      t.ok(follow(told, events), `${events} in ${told}`)
      // The page tells of this by its own clock.
      t.equal(
        told.includes('lost'),
        replies.some((reply) => reply.startsWith('50'))
      )
      for (const name of never) t.notOk(told.includes(name), name)
      t.same((await demo.replies('with')).sort(), replies)
      t.notOk((await demo.replies('without')).join().includes('replay'))
      if (button === 'half') t.match(await demo.page.text('#without .replies'), /503\s*the warehouse answers 503/)
    })

  t.test('two clicks on "Order" are one order', async (t) => {
    const demo = await visit()
    await demo.page.click('[data-play=order]', { times: 2 })
    await demo.idle()
    await demo.counts(t, 'with', once)
    await demo.counts(t, 'without', twice)
    t.match(await demo.page.text('#log'), /Clicked again/)
    t.match(await demo.page.text('#status'), /gets the reply of the first click/)
  })

  t.test('while the store is stopped nothing runs unprotected, and afterwards the order goes through', async (t) => {
    const demo = await visit()
    const { page } = demo
    await page.click('#store')
    await page.waitFor("document.querySelector('#store').innerText.startsWith('Start the store')")
    t.equal(
      await page.evaluate("document.querySelector('#store').ariaPressed"),
      null,
      'the label alone says what it does'
    )
    t.match(await page.text('#store-chip'), /stopped/)
    t.equal(await page.evaluate("document.querySelector('[data-play=kill]').getAttribute('aria-disabled')"), 'true')
    await page.click('[data-play=order]')
    await page.waitForElement('#log .bad[data-what=replied]')
    await page.waitFor("document.querySelector('#without [data-count=orders]').textContent === '1'")
    t.match(await demo.count('with'), { charges: 0, orders: 0, runs: 0 })
    t.match(await page.text('#with .replies'), /503\s*STORE_UNAVAILABLE/)
    await demo.watchStatus()
    await page.click('#store')
    await demo.idle()
    for (const side of SIDES) await demo.counts(t, side, once)
    t.ok((await demo.events('with')).includes('store-error'))
    const [back, end] = await demo.said()
    t.equal(back, 'The store is back: what waits goes on.')
    t.match(end, /503, and the client kept its key.* went through, once/)
  })

  t.test('an outage is told of whatever is ordered in it', async (t) => {
    const demo = await visit()
    const { page } = demo
    await page.click('#store')
    await page.waitForElement('#store.primary')
    await page.click('[data-play=double]')
    await page.waitForElement('#log .bad[data-what=replied]')
    await page.click('#store')
    await demo.idle()
    t.match(await page.text('#status'), /all requests with this key went through as one order/)
    await demo.counts(t, 'with', once)
  })

  t.test('an order that runs already when the store stops gets its reply, which is stored later', async (t) => {
    const demo = await visit()
    const { page } = demo
    await hold()
    await page.click('[data-play=order]')
    await page.waitForElement('#log [data-side=with][data-what=charged]')
    await page.click('#store')
    await page.waitForElement('#store.primary')
    await go()
    await demo.idle()
    t.match(await page.text('#status'), /it went on, and the client got its reply/)
    t.same(await demo.replies('with'), ['201'])
    await page.click('#store')
    await page.waitFor("document.querySelector('#log').innerText.includes('The store has the reply now')")
  })

  t.test('while a dead process has the key, the page says what the retry waits for', async (t) => {
    const demo = await visit()
    const { page } = demo
    await demo.watchStatus()
    await page.click('[data-play=kill]')
    await page.waitFor(
      "/process is dead: the lease ends in \\d+\\.\\d s, then the retry runs/.test(document.querySelector('#key-text').innerText)"
    )
    await demo.idle()
    t.ok((await demo.said()).some((text) => /process is dead. The retry waits/.test(text)))
  })

  t.test('the key is shown with what is left of its lease, and then of its reply', async (t) => {
    const { page } = await visit()
    t.match(await page.text('#key'), 'no key yet')
    t.match(await page.text('#store-chip'), /in the SQLite file .* survive a restart/)
    await hold()
    await page.click('[data-play=order]')
    await page.waitFor("/Attempt 1; its lease lasts \\d+\\.\\d s/.test(document.querySelector('#key-text').innerText)")
    t.equal(await page.text('#key-state'), 'claimed')
    await go()
    await page.waitFor(
      "/Status 201, replayed to every retry for \\d+:\\d\\d/.test(document.querySelector('#key-text').innerText)"
    )
    t.equal(await page.text('#key-state'), 'reply stored')
  })

  t.test('by the keyboard alone', async (t) => {
    const demo = await visit()
    const { page } = demo
    const focused = () => page.evaluate("document.activeElement.dataset.play ?? ''")
    for (let tabs = 0; tabs < 20 && (await focused()) !== 'double'; tabs++) await page.pressTab()
    t.equal(await focused(), 'double')
    t.equal(await page.evaluate('getComputedStyle(document.activeElement).outlineStyle'), 'solid')
    await page.pressEnter()
    await demo.idle()
    await demo.counts(t, 'with', once)
    t.equal(await focused(), 'double', 'the focus stays where it was')
    const log = "document.activeElement.id === 'log'"
    for (let tabs = 0; tabs < 20 && !(await page.evaluate(log)); tabs++) await page.pressTab()
    t.ok(await page.evaluate(log), 'the timeline can be scrolled')
  })

  t.test('a page that is loaded again shows what has happened, until somebody starts over', async (t) => {
    const demo = await visit()
    await demo.play('order')
    await demo.page.reload()
    await demo.page.waitForElement('#log [data-what=stored]')
    await demo.counts(t, 'with', once)
    t.equal(await demo.page.text('#with .replies'), 'No request from this page yet')
    t.equal(await demo.page.evaluate("document.querySelector('#key-state').checkVisibility()"), false)
    await demo.page.click('#reset')
    await demo.page.waitFor("document.querySelector('#log').innerText.startsWith('Nothing yet')")
    await demo.counts(t, 'with', { charged: '€0.00', charges: 0, orders: 0, runs: 0, verdict: 'Nothing ordered yet' })
    t.equal(await demo.page.text('#with .replies'), 'No request yet')
  })

  t.test('on a small screen what is said is in sight, and in the end what has come of it', async (t) => {
    const demo = await visit()
    const { page } = demo
    const isInSight = (selector: string) => `(() => {
      const { top, bottom } = document.querySelector('${selector}').getBoundingClientRect()
      return top >= 0 && bottom <= innerHeight
    })()`
    await page.resize(390, 664)
    await hold()
    await page.evaluate("document.querySelector('[data-play=order]').click()")
    await page.waitForElement('#status.busy')
    t.ok(await page.evaluate(isInSight('#status')))
    await page.waitForElement('#log [data-side=with][data-what=charged]')
    await go()
    await demo.idle()
    await page.waitFor(isInSight('#with .money'))
    t.ok(await page.evaluate(isInSight('#status')))
  })

  t.test('when the demo ends, nothing looks as if it could be used', async (t) => {
    const demo = await startDemo(readSettings({ DATABASE_URL: 'memory:' }), { host: '127.0.0.1', port: 0 })
    const { page } = await visit(demo.url)
    await demo.close()
    await page.waitFor("!document.querySelector('#offline').hidden")
    t.equal(await page.evaluate("document.querySelectorAll('.chip:not(.off)').length"), 0)
    t.equal(await page.evaluate("document.querySelectorAll('button:not([aria-disabled=true])').length"), 0)
  })

  t.test('it is readable in light and dark, wide and narrow, and told to those who do not see it', async (t) => {
    const demo = await visit()
    const { page } = demo
    await demo.play('amount')
    // As long as it becomes.
    await page.evaluate("document.querySelector('#with .replies .text').textContent = 'STORE_UNAVAILABLE'")
    for (const scheme of ['light', 'dark'] as const) {
      await page.prefer(scheme)
      const least = await page.evaluate<{ text: string; contrast: number }>(LEAST_CONTRAST)
      t.ok(least.contrast >= 4.5, `${scheme}: ${JSON.stringify(least)}`)
    }
    for (const width of [320, 390, 768, 1280, 1920]) {
      await page.resize(width, 900)
      const { shown, all } = await page.evaluate<Record<'shown' | 'all', number>>(
        '({ shown: document.documentElement.clientWidth, all: document.documentElement.scrollWidth })'
      )
      t.equal(all, shown, `nothing sticks out at ${width}`)
      t.same(await page.evaluate(STICKING_OUT), [], `nor out of what it is in at ${width}`)
    }
    t.equal(await page.evaluate("document.querySelector('#log').ariaLive"), 'off', 'not each line is read out')
    t.equal(await page.evaluate("document.querySelector('#status').getAttribute('role')"), 'status')
    t.same(
      await page.evaluate("Array.from(document.querySelectorAll('button')).filter((one) => !one.innerText.trim())"),
      []
    )
  })

  t.test('what it links to is there, and the handler that it shows is the one of the example', async (t) => {
    const { page } = await visit()
    await page.waitFor(`document.querySelector('#handler').textContent.includes("await step('payment'")`)
    const links = await page.evaluate<string[]>("Array.from(document.querySelectorAll('nav a'), (a) => a.href)")
    t.equal(links.length, 3)
    const texts = await Promise.all(links.map(async (link) => (await fetch(link)).text()))
    t.match(texts.join(), /Swagger UI.*idempotency_events_total.*Order a book/s)
    const document = (await (await fetch(`${url}/docs/json`)).json()) as { paths: Record<string, object> }
    t.match(JSON.stringify(document.paths['/with/orders']), 'Idempotency-Key')
    t.notMatch(JSON.stringify(document.paths['/without/orders']), 'Idempotency-Key')
    t.equal((await fetch(`${url}/demo/nothing.js`)).status, 404)
  })

  t.test('with the keys in memory a kill forgets them, and the page says so', async (t) => {
    const demo = await visit(await start('memory:'))
    t.match(await demo.page.text('#store-chip'), /in memory: a restart forgets them/)
    const process = await demo.page.text('#shop-chip')
    t.match(await demo.play('kill'), /the keys went with the process/)
    t.match(await demo.page.text('#log'), /killed by SIGKILL/)
    t.not(await demo.page.text('#shop-chip'), process, 'it is another process now')
    await demo.counts(t, 'with', { ...once, runs: 2 })
    t.notOk((await demo.events('with')).includes('takeover'))
  })

  t.test('no script has failed on any of these pages', async (t) => {
    t.ok(pages.length > scenarios.length)
    for (const page of pages) t.same(page.complaints, [])
  })
})
