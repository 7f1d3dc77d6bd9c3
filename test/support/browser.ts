import { writeFileSync } from 'node:fs'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import { until } from './latch.js'
import { launch, makeFolder, type ServerProcess } from './process.js'

// Chromium without a screen, spoken to over its own protocol (Chrome DevTools Protocol): JSON messages on two pipes, each
// ended by a NUL. Where those break, it ends by itself.

const services: { findChromium(): { program: string; env: Record<string, string> } | null } = await import(
  new URL('../../../scripts/services.mjs', import.meta.url).href
)

/** What a page has to do within, on a slow and busy machine. */
const TIMEOUT = 180_000

const FLAGS = [
  '--headless=new',
  // The pages are our own, and root, or a container, cannot have it.
  '--no-sandbox',
  '--remote-debugging-pipe',
  '--disable-gpu',
  '--disable-dev-shm-usage',
  '--disable-breakpad',
  '--disable-extensions',
  '--disable-sync',
  '--disable-background-networking',
  '--disable-component-update',
  '--no-first-run',
  '--no-default-browser-check',
  '--no-proxy-server',
  '--password-store=basic'
]

type Params = Record<string, unknown>
type Listener = (params: Params) => void

interface Pending {
  method: string
  resolve: (result: Params) => void
  reject: (error: Error) => void
}

/** Something with a teardown: a tap test. */
interface Owner {
  teardown(fn: () => unknown): void
}

/** A browser with an empty profile. It ends with the test, and at the latest with its process. */
export async function startBrowser(t: Owner): Promise<Browser> {
  const chromium = services.findChromium()
  if (!chromium) throw new Error('There is no Chromium: run `node scripts/services.mjs`')
  const folder = makeFolder('chromium')
  const profile = [`--user-data-dir=${join(folder, 'profile')}`, `--crash-dumps-dir=${folder}`]
  const env = { ...chromium.env, HOME: folder, XDG_CONFIG_HOME: folder, XDG_CACHE_HOME: folder }
  const process = await launch(chromium.program, [...FLAGS, ...profile], { env, log: join(folder, 'log'), pipes: 2 })
  const browser = new Browser(process)
  t.teardown(() => browser.close())
  await browser.send('Browser.getVersion')
  return browser
}

export class Browser {
  readonly #process: ServerProcess
  readonly #input: Socket
  readonly #pending = new Map<number, Pending>()
  readonly #listeners = new Map<string, Listener>()
  #lastId = 0

  constructor(process: ServerProcess) {
    this.#process = process
    const [input, output] = process.pipes as [Socket, Socket]
    this.#input = input
    input.on('error', () => {})
    output.on('error', () => {})
    output.setEncoding('utf8')
    let rest = ''
    output.on('data', (text: string) => {
      const messages = (rest + text).split('\0')
      rest = messages.pop() as string
      for (const message of messages) this.#receive(JSON.parse(message))
    })
    output.on('close', () => {
      for (const { method, reject } of this.#pending.values())
        reject(new Error(`Chromium ended during ${method}:\n${process.output()}`))
      this.#pending.clear()
    })
  }

  /** A page in a window of its own, that shares neither cookies nor cache with others. */
  async open({ javascript = true } = {}): Promise<Page> {
    const { browserContextId } = await this.send('Target.createBrowserContext')
    return this.openIn(browserContextId as string, javascript)
  }

  /** @internal */
  async openIn(browserContextId: string, javascript: boolean): Promise<Page> {
    const { targetId } = await this.send('Target.createTarget', { url: 'about:blank', browserContextId })
    const { sessionId } = await this.send('Target.attachToTarget', { targetId, flatten: true })
    const page = new Page(this, sessionId as string, browserContextId, javascript)
    this.#listeners.set(sessionId as string, (message) => page.receive(message))
    await page.send('Page.enable')
    if (!javascript) await page.send('Emulation.setScriptExecutionDisabled', { value: true })
    return page
  }

  /** One command of the protocol. Rejects with what the browser says against it. */
  send(method: string, params: Params = {}, sessionId?: string): Promise<Params> {
    const id = ++this.#lastId
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { method, resolve, reject })
      this.#input.write(`${JSON.stringify({ id, method, params, ...(sessionId && { sessionId }) })}\0`)
    })
  }

  #receive(message: Params): void {
    if (typeof message.id !== 'number') {
      this.#listeners.get(message.sessionId as string)?.(message)
      return
    }
    const pending = this.#pending.get(message.id)
    this.#pending.delete(message.id)
    const error = message.error as { message: string } | undefined
    if (error) pending?.reject(new Error(`${pending.method}: ${error.message}`))
    else pending?.resolve(message.result as Params)
  }

  /** Asked to, it leaves no process behind that still writes to its folder. */
  async close(): Promise<void> {
    const impatience = setTimeout(() => this.#process.signal('SIGKILL'), 10_000)
    this.send('Browser.close').catch(() => {})
    await this.#process.exited
    clearTimeout(impatience)
    for (const pipe of this.#process.pipes) pipe.destroy()
  }
}

export interface ClickOptions {
  /** How often, as fast as can be: 2 is a double click. */
  times?: number
}

export interface Place {
  x: number
  y: number
}

/** A tab. */
export class Page {
  readonly #browser: Browser
  readonly #session: string
  readonly #context: string
  readonly #javascript: boolean
  #navigations = 0
  /** What scripts have failed with or complained of, once `watchScripts` was called. That a request failed is not among it. */
  readonly complaints: string[] = []

  constructor(browser: Browser, session: string, context: string, javascript: boolean) {
    this.#browser = browser
    this.#session = session
    this.#context = context
    this.#javascript = javascript
  }

  /** Another tab of the same window. */
  openTab(): Promise<Page> {
    return this.#browser.openIn(this.#context, this.#javascript)
  }

  send(method: string, params?: Params): Promise<Params> {
    return this.#browser.send(method, params, this.#session)
  }

  /** @internal */
  receive({ method, params }: Params): void {
    const { frame } = (params ?? {}) as { frame?: { parentId?: string } }
    if (method === 'Page.frameNavigated' && frame?.parentId === undefined) this.#navigations++
    const { type, entry } = (params ?? {}) as { type?: string; entry?: { source: string; level: string } }
    const isError =
      method === 'Runtime.exceptionThrown' ||
      (method === 'Runtime.consoleAPICalled' && type === 'error') ||
      (method === 'Log.entryAdded' && entry?.level === 'error' && entry.source !== 'network')
    if (isError) this.complaints.push(JSON.stringify(params))
  }

  async watchScripts(): Promise<void> {
    await this.send('Runtime.enable')
    await this.send('Log.enable')
  }

  /** Does what makes the page change, and waits until another one is there, or the same one anew. */
  async navigated(action: () => Promise<unknown>): Promise<void> {
    const before = this.#navigations
    await action()
    await until(() => this.#navigations > before, { timeout: TIMEOUT, message: 'another page' })
    await this.waitFor("document.readyState === 'complete'")
  }

  async goto(url: string): Promise<void> {
    await this.navigated(async () => {
      const { errorText } = await this.send('Page.navigate', { url })
      if (errorText) throw new Error(`${url}: ${errorText}`)
    })
  }

  /** As the button does. What was posted is posted again: here, where nobody can be asked. */
  reload(): Promise<void> {
    return this.navigated(() => this.send('Page.reload'))
  }

  back(): Promise<void> {
    return this.#travel(-1)
  }

  forward(): Promise<void> {
    return this.#travel(+1)
  }

  async #travel(steps: number): Promise<void> {
    const { currentIndex, entries } = await this.send('Page.getNavigationHistory')
    const entry = (entries as { id: number }[])[(currentIndex as number) + steps]
    if (!entry) throw new Error('There is no such page in the history')
    await this.navigated(() => this.send('Page.navigateToHistoryEntry', { entryId: entry.id }))
  }

  /** What an expression gives, also where the page itself may not run scripts. */
  async evaluate<T = unknown>(expression: string): Promise<T> {
    const answer = await this.send('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true })
    const { result, exceptionDetails } = answer as {
      result: { value: T }
      exceptionDetails?: { text: string; exception?: { description?: string } }
    }
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text)
    return result.value
  }

  /** Waits until an expression gives something. */
  async waitFor<T = unknown>(expression: string): Promise<T> {
    // The page may go in the middle of it. What is wrong with the expression itself is told in the end.
    let error: unknown
    const look = () =>
      this.evaluate<T>(expression).catch((reason) => {
        error = reason
        return undefined as T
      })
    try {
      return await until(look, { timeout: TIMEOUT, message: expression })
    } catch (reason) {
      throw error === undefined ? reason : new Error((reason as Error).message, { cause: error })
    }
  }

  /** Waits until there is such an element. */
  async waitForElement(selector: string): Promise<void> {
    await this.waitFor(`document.querySelector(${JSON.stringify(selector)}) !== null`)
  }

  async text(selector = 'body'): Promise<string> {
    return this.waitFor(`document.querySelector(${JSON.stringify(selector)})?.innerText`)
  }

  /** Where the middle of an element is. While another page is on its way the browser tells nothing: ask before. */
  place(selector: string): Promise<Place> {
    return this.waitFor(`(() => {
      const element = document.querySelector(${JSON.stringify(selector)})
      if (!element) return
      element.scrollIntoView({ block: 'center', behavior: 'instant' })
      const { x, y, width, height } = element.getBoundingClientRect()
      return width > 0 && { x: x + width / 2, y: y + height / 2 }
    })()`)
  }

  /** Moves the mouse there and presses its button. */
  async click(target: string | Place, { times = 1 }: ClickOptions = {}): Promise<void> {
    const place = typeof target === 'string' ? await this.place(target) : target
    const mouse = (type: string, clickCount: number) =>
      this.send('Input.dispatchMouseEvent', { type, ...place, button: 'left', clickCount })
    const events: Promise<unknown>[] = []
    for (let count = 1; count <= times; count++)
      events.push(mouse('mousePressed', count), mouse('mouseReleased', count))
    await Promise.all(events)
  }

  /** Goes to the next element that takes the focus. */
  async pressTab(): Promise<void> {
    const key = { key: 'Tab', code: 'Tab', windowsVirtualKeyCode: 9 }
    await Promise.all([
      this.send('Input.dispatchKeyEvent', { type: 'keyDown', ...key }),
      this.send('Input.dispatchKeyEvent', { type: 'keyUp', ...key })
    ])
  }

  /** Presses Enter, where the focus is. */
  async pressEnter(): Promise<void> {
    const key = { key: 'Enter', code: 'Enter', windowsVirtualKeyCode: 13 }
    await Promise.all([
      this.send('Input.dispatchKeyEvent', { type: 'keyDown', text: '\r', ...key }),
      this.send('Input.dispatchKeyEvent', { type: 'keyUp', ...key })
    ])
  }

  focus(selector: string): Promise<void> {
    return this.evaluate(`document.querySelector(${JSON.stringify(selector)}).focus()`)
  }

  /** As a person does who selects what is there and types something else. */
  async type(selector: string, text: string): Promise<void> {
    await this.evaluate(
      `{ const field = document.querySelector(${JSON.stringify(selector)}); field.focus(); field.select() }`
    )
    await this.send('Input.insertText', { text })
  }

  /** In CSS pixels. */
  async resize(width: number, height: number): Promise<void> {
    await this.send('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile: false })
  }

  async prefer(scheme: 'light' | 'dark'): Promise<void> {
    const features = [{ name: 'prefers-color-scheme', value: scheme }]
    await this.send('Emulation.setEmulatedMedia', { features })
  }

  /** A PNG of the whole page. */
  async screenshot(file: string): Promise<void> {
    const { data } = await this.send('Page.captureScreenshot', { captureBeyondViewport: true })
    writeFileSync(file, Buffer.from(data as string, 'base64'))
  }
}
