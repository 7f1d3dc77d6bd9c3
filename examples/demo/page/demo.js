/* The page: wires buttons, counters and the timeline to the shops. */

import { idempotentFetch } from '/demo/lib/client.js'
import { createKeyView } from './key.js'
import { closing, newOrder, scenarios } from './scenarios.js'
import { createTimeline } from './timeline.js'
import { breakable, money, name } from './words.js'

const $ = (selector) => document.querySelector(selector)
const timeline = createTimeline($('#log'))

/** How things stand, as the server says; `null` before it has said anything. */
let state = null
/** Nobody tells anything at present. */
let isOffline = false
/** The scenario that runs, and its order. */
let running = null
/** When a key was claimed, and when a process was killed, the last time. */
let claimedAt = 0
let killedAt = 0
const keyView = createKeyView({ isBusy: () => running !== null, missing, isDead: () => killedAt > claimedAt })
/** What the clock of the server is ahead: a message that took its time makes it seem less. */
let ahead = Number.NEGATIVE_INFINITY
/** Called with each thing that happens. */
const watchers = new Set()

/** What cannot be asked for a key at present. */
function missing() {
  if (state?.shop.pid === null) return 'shop'
  return state?.store.running === false ? 'store' : null
}

// Being told

const events = new EventSource('/demo/events')
events.onopen = () => setOffline(false)
events.onerror = () => setOffline(true)
events.onmessage = ({ data }) => {
  const message = JSON.parse(data)
  ahead = Math.max(ahead, message.now - Date.now())
  state = message.state
  if (message.anew) {
    timeline.clear()
    keyView.clear()
    showExchanges([])
    if (running === null) setStatus(state.store.running ? READY : STOPPED)
  }
  for (const happening of message.happened) {
    timeline.add(happening)
    if (happening.what === 'acquired' && happening.side === 'with') claimedAt = happening.at
    if (happening.what === 'killed') killedAt = happening.at
    // What is over is not told again.
    if (message.anew) continue
    for (const watch of watchers) watch(happening)
    comment(happening)
  }
  if (message.happened.some(({ side }) => side === 'with')) keyView.refresh()
  show()
}

function setOffline(isSo) {
  isOffline = isSo
  $('#offline').hidden = !isSo
  show()
}

/** Something that only the page knows. */
function note(what, details = {}) {
  timeline.add({ what, at: Date.now() + ahead, ...details })
}

/** Resolves when this has happened to both shops, from now on. */
function happened(what) {
  const missing = new Set(['with', 'without'])
  return new Promise((resolve, reject) => {
    const impatience = setTimeout(() => end(reject, new Error(`no "${what}" within two minutes`)), 120_000)
    const watch = (happening) => {
      if (happening.what === what) missing.delete(happening.side)
      if (missing.size === 0) end(resolve)
    }
    const end = (settle, value) => {
      clearTimeout(impatience)
      watchers.delete(watch)
      settle(value)
    }
    watchers.add(watch)
  })
}

// Sending

/** What was sent to each side in this scenario, and what came back. */
let exchanges = []
/** So many of them are shown. */
const MOST_REPLIES = 6
/** Is there something that this page has not sent itself? */
const isLatecomer = () => running === null && state?.wanted.orders > 0

function showExchanges(list) {
  exchanges = list
  for (const side of ['with', 'without']) {
    const all = exchanges.filter((exchange) => exchange.side === side)
    const items = all.slice(-MOST_REPLIES).map(exchangeItem)
    const hidden = all.length - items.length
    if (all.length === 0) items.push(emptyItem(isLatecomer() ? 'No request from this page yet' : 'No request yet'))
    if (hidden > 0) items.unshift(emptyItem(`${hidden} more before`))
    $(`#${side} .replies`).replaceChildren(...items)
  }
}

function emptyItem(text) {
  const item = document.createElement('li')
  item.className = 'empty'
  item.textContent = text
  return item
}

function exchangeItem({ status, replayed, text, customer }) {
  const item = document.createElement('li')
  const code = document.createElement('b')
  code.textContent = status ?? '…'
  code.className = status === null ? 'wait' : status < 300 ? 'ok' : 'no'
  const what = document.createElement('span')
  what.className = 'text'
  what.append(...breakable(customer === 'alice' ? text : `${name(customer)}: ${text}`))
  item.append(code, what)
  if (replayed) {
    const mark = document.createElement('i')
    mark.textContent = 'replay'
    mark.title = 'Idempotent-Replayed: true'
    item.append(mark)
  }
  return item
}

/** One request and its reply, shown. */
async function exchange(side, customer, request) {
  const shown = { side, customer, status: null, replayed: false, text: 'on its way' }
  showExchanges([...exchanges, shown])
  try {
    const response = await fetch(request)
    const body = await response
      .clone()
      .json()
      .catch(() => ({}))
    const isLost = [502, 503].includes(response.status)
    shown.status = response.status
    shown.replayed = response.headers.get('idempotent-replayed') === 'true'
    shown.text = response.ok
      ? `order ${body.order}, ${money(body.amount)}`
      : (body.code?.replace('FST_IDEMPOTENCY_', '') ?? body.message ?? '')
    if (running !== null && side === 'with') {
      if (body.code === 'FST_IDEMPOTENCY_STORE_UNAVAILABLE') running.away = 'refused'
      else if (response.ok && !state.store.running) running.away ??= 'later'
    }
    if (isLost) note('lost', { side, status: response.status })
    return response
  } catch (error) {
    shown.status = '×'
    shown.text = 'no reply'
    if (error.name !== 'AbortError') note('lost', { side })
    throw error
  } finally {
    showExchanges(exchanges)
  }
}

const request = (side, { customer, item, amount }) => [
  `/${side}/orders`,
  {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${customer}` },
    body: JSON.stringify({ item, amount })
  }
]

/** As a client does that cares for its order: with the same key, until there is a reply. */
function send(side, order) {
  const client = idempotentFetch({
    minDelay: 400,
    maxDelay: 1_500,
    maxAttempts: 100,
    // The demo answers whenever it can: on a slow machine a process takes its time to start.
    attemptTimeout: null,
    fetch: (request) => exchange(side, order.customer, request)
  })
  const [url, init] = request(side, order)
  return client(url, { ...init, idempotencyKey: order.key })
}

/** One attempt, that may be cut. */
function sendOnce(side, order, signal) {
  const [url, init] = request(side, order)
  const headers = { ...init.headers, 'idempotency-key': order.key }
  return exchange(side, order.customer, new Request(url, { ...init, headers, signal })).catch(() => null)
}

async function control(what, body = {}) {
  const response = await fetch(`/demo/${what}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body)
  })
  if (!response.ok) throw new Error(`the demo answers ${response.status}`)
}

// Playing

function setStatus(text, kind = '') {
  const status = $('#status')
  status.textContent = text
  status.className = `status ${kind}`
}

/** On a small screen the status is below the buttons, and the shops are below it. */
function reveal() {
  const status = $('#status')
  const isOver = status.matches('.done, .failed')
  const seen = isOver ? $('#with .verdict') : status
  if (seen.getBoundingClientRect().bottom <= innerHeight) return
  const behavior = matchMedia('(prefers-reduced-motion: reduce)').matches ? 'instant' : 'smooth'
  status.scrollIntoView({ block: isOver ? 'start' : 'nearest', behavior })
}

const READY = 'Press a button: both shops get the same requests.'
const STOPPED =
  'The store is stopped. Order now: the plugin lets nothing run that it cannot protect, it answers 503, and the client keeps trying until you start the store again.'

/** Said of what happens: in between, and in the middle of something. */
const COMMENTS = {
  'store-stopped': [
    STOPPED,
    'The store is stopped. What runs already goes on; what comes now goes through when you start it.'
  ],
  'store-started': ['The store is back.', 'The store is back: what waits goes on.']
}

function comment({ what }) {
  const [idle, busy = running?.scenario.meanwhile?.[what]?.(state.store.survives)] = COMMENTS[what] ?? []
  const text = running === null ? idle : busy
  if (text === undefined) return
  setStatus(text, running === null ? '' : 'busy')
  reveal()
}

async function play(id) {
  if (running !== null) {
    // A person who clicks twice is what this is about.
    if (id !== 'order' || running.id !== 'order') return
    note('again')
    running.clicks++
    running.more.push(running.scenario.run(running))
    return
  }
  const scenario = scenarios[id]
  if (state === null || isOffline || (scenario.needsStore && !state.store.running)) return
  const order = newOrder()
  running = { id, scenario, order, clicks: 1, more: [], away: null, send, sendOnce, control, happened, note }
  const { title } = scenario
  showExchanges([])
  keyView.follow(order)
  setStatus(`${title} …${state.store.running ? '' : ' The store is stopped: start it, and it goes through.'}`, 'busy')
  show()
  try {
    const orders = scenario.orders ?? 1
    await control('begin', { title, orders, amount: orders * order.amount })
    await scenario.run(running)
    // The list grows while it is waited for.
    for (const again of running.more) await again
    setStatus(closing(scenario, { ...running, survives: state.store.survives }), 'done')
  } catch (error) {
    setStatus(`That did not work: ${error.message}`, 'failed')
  } finally {
    running = null
    keyView.refresh()
    show()
    reveal()
  }
}

for (const button of document.querySelectorAll('[data-play]')) {
  button.addEventListener('click', () => play(button.dataset.play))
}

$('#store').addEventListener('click', () => {
  if (state === null || isOffline || (running !== null && running.id !== 'order' && state.store.running)) return
  control('store', { running: !state.store.running }).then(
    () => keyView.refresh(),
    (error) => setStatus(`That did not work: ${error.message}`, 'failed')
  )
})

$('#reset').addEventListener('click', async () => {
  if (running !== null || isOffline) return
  await control('reset').catch(() => {})
})

// Showing

function verdict({ charged, orders }, wanted) {
  if (wanted.orders === 0) return ['', 'Nothing ordered yet']
  if (running !== null) return ['', 'On its way …']
  const difference = charged - wanted.amount
  if (difference === 0 && orders === wanted.orders) return ['good', 'Charged as ordered']
  if (difference > 0) return ['bad', `${money(difference)} too much`]
  return ['bad', 'Not all of it has gone through']
}

function show() {
  if (state === null) return
  for (const side of ['with', 'without']) {
    const section = $(`#${side}`)
    const books = state.books[side]
    for (const place of section.querySelectorAll('[data-count]')) {
      const value = books[place.dataset.count]
      const text = place.dataset.count === 'charged' ? money(value) : String(value)
      if (place.textContent !== text) place.textContent = text
    }
    const { orders, amount } = state.wanted
    section.querySelector('.wanted').textContent = orders === 0 ? 'for nothing yet' : `for ${money(amount)} ordered`
    const [kind, text] = verdict(books, state.wanted)
    const place = section.querySelector('.verdict')
    place.className = `verdict ${kind}`
    if (place.textContent !== text) place.textContent = text
  }
  if (exchanges.length === 0) showExchanges([])
  showChips(state)
  const { store } = state
  $('#store').classList.toggle('primary', !store.running)
  $('#store b').textContent = store.running ? 'Stop the store' : 'Start the store'
  $('#store span').textContent = store.running ? 'then order' : 'what waits goes on'
  // Not `disabled`: the focus stays where it is.
  for (const button of document.querySelectorAll('[data-play]')) {
    const { needsStore } = scenarios[button.dataset.play]
    const isBusy = running !== null && !(running.id === 'order' && button.dataset.play === 'order')
    button.setAttribute('aria-disabled', String(isOffline || isBusy || (needsStore === true && !store.running)))
    button.classList.toggle('playing', running?.id === button.dataset.play)
  }
  const mayNotStop = running !== null && running.id !== 'order' && store.running
  $('#store').setAttribute('aria-disabled', String(isOffline || mayNotStop))
  $('#reset').setAttribute('aria-disabled', String(isOffline || running !== null))
}

function showChips({ shop, store }) {
  const chip = (id, isOn, ...text) => {
    $(id).replaceChildren(...text)
    $(id).classList.toggle('off', !isOn)
  }
  if (isOffline) {
    chip('#shop-chip', false, 'Shop: no answer')
    chip('#store-chip', false, 'Keys: no answer')
    return
  }
  const isUp = shop.pid !== null
  chip('#shop-chip', isUp, isUp ? `Shop: process ${shop.pid}` : 'Shop: starting again …')
  // On a small screen there is room for the place alone.
  const [place] = store.place.split(/[,:] /)
  const rest = document.createElement('span')
  rest.className = 'rest'
  rest.textContent = store.place.slice(place.length)
  chip('#store-chip', store.running, `Keys ${place}`, rest, store.running ? '' : ' · stopped')
}

fetch('/demo/handler')
  .then((response) => response.text())
  .then((text) => {
    $('#handler').textContent = text
  })
  .catch(() => {})
