// Takes the pictures of the demo in docs/images/: `npm run screenshots`.

import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { startDemo } from '../.build/examples/demo/demo.js'
import { readSettings } from '../.build/examples/settings.js'
import { startBrowser } from '../.build/test/support/browser.js'
import { smallPng } from './small-png.mjs'

const images = fileURLToPath(new URL('../docs/images/', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'screenshots-'))
mkdirSync(images, { recursive: true })

/** @type {(() => unknown)[]} */
const ends = []
const settings = readSettings({ DATABASE_URL: `sqlite:${join(folder, 'example.sqlite')}` })
// Not the path of this machine.
const place = 'in the SQLite file example.sqlite, where they survive a restart'
const demo = await startDemo({ ...settings, place }, { host: '127.0.0.1', port: 0 })
const browser = await startBrowser({ teardown: (end) => ends.push(end) })
const page = await browser.open()
await page.send('Emulation.setScrollbarsHidden', { hidden: true })
await page.resize(1280, 1180)
await page.goto(demo.url)
await page.waitFor("document.querySelector('#shop-chip').textContent.includes('process')")

/** @param {string} button */
async function play(button) {
  await page.click(`[data-play=${button}]`)
  await page.waitFor("document.querySelector('#status').classList.contains('done')")
}

/** @type {(name: string, width: number, height: number, scheme: 'light' | 'dark') => Promise<void>} */
async function take(name, width, height, scheme) {
  await page.prefer(scheme)
  await page.resize(width, height)
  // The timeline is at its end in each size, and nothing has the focus or the mouse over it.
  await page.evaluate(`{
    document.activeElement.blur()
    const log = document.querySelector('#log')
    log.scrollTop = log.scrollHeight
    scrollTo(0, 0)
  }`)
  await page.send('Input.dispatchMouseEvent', { type: 'mouseMoved', x: 1, y: 1 })
  const file = join(images, `${name}.png`)
  await page.screenshot(file)
  const png = smallPng(readFileSync(file))
  writeFileSync(file, png)
  console.log(`${name}: ${Math.round(png.length / 1024)} KB`)
}

await play('double')
await play('kill')
await take('demo-light', 1280, 1060, 'light')
await take('demo-dark', 1280, 1060, 'dark')
await take('demo-narrow-light', 390, 1260, 'light')
await take('demo-narrow-dark', 390, 1260, 'dark')

for (const end of ends) await end()
await demo.close()
rmSync(folder, { recursive: true })
