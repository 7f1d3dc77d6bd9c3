/* The page: wires buttons, counters and the timeline to the shops. */

import { idempotentFetch } from '/demo/lib/client.js'
import { createKeyView } from './key.js'
import { newOrder, scenarios } from './scenarios.js'
import { createTimeline } from './timeline.js'
import { money, name } from './words.js'

const $ = (selector) => document.querySelector(selector)
const timeline = createTimeline($('#log'))

/** How things stand, as the server says; `null` before it has said anything. */
let state = null
/** The scenario that runs, and its order. */
let running = null
const keyView = createKeyView({ isBusy: () => running !== null, missing })
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
events.onopen = () => {
  $('#offline').hidden = true
}
events.onerror = () => {
  $('#offline').hidden = false
}
events.onmessage = ({ data }) => {
  const message = JSON.parse(data)
  ahead = Math.max(ahead, message.now - Date.now())
  state = message.state
  // What is over is not read out.
  $('#log').ariaLive = message.anew ? 'off' : 'polite'
  if (message.anew) {
    timeline.clear()
    keyView.clear()
    showExchanges([])
  }
  for (const happening of message.happened) {
    timeline.add(happening)
    for (const watch of watchers) watch(happening)
  }
  if (message.happened.some(({ side }) => side === 'with')) keyView.refresh()
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

function showExchanges(list) {
  exchanges = list
  for (const side of ['with', 'without']) {
    const all = exchanges.filter((exchange) => exchange.side === side)
    const items = all.slice(-MOST_REPLIES).map(exchangeItem)
    const hidden = all.length - items.length
    if (all.length === 0) items.push(emptyItem('No request yet'))
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
  what.textContent = customer === 'alice' ? text : `${name(customer)}: ${text}`
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
  $('#status').textContent = text
  $('#status').className = `status ${kind}`
}

async function play(id) {
  if (running !== null) {
    // A person who clicks twice is what this is about.
    if (id !== 'order' || running.id !== 'order') return
    note('again')
    running.more.push(running.scenario.run(running))
    return
  }
  const scenario = scenarios[id]
  if (state === null || (scenario.needsStore && !state.store.running)) return
  const order = newOrder()
  running = { id, scenario, order, more: [], send, sendOnce, control, happened, note }
  const { title, done, forgetful } = scenario
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
    setStatus((!state.store.survives && forgetful) || done, 'done')
  } catch (error) {
    setStatus(`That did not work: ${error.message}`, 'failed')
  } finally {
    running = null
    keyView.refresh()
    show()
  }
}

for (const button of document.querySelectorAll('[data-play]')) {
  button.addEventListener('click', () => play(button.dataset.play))
}

const STOPPED =
  'The store is stopped. Order now: the plugin lets nothing run that it cannot protect, it answers 503, and the client keeps trying until you start the store again.'

$('#store').addEventListener('click', () => {
  if (state === null || (running !== null && running.id !== 'order' && state.store.running)) return
  const starts = !state.store.running
  control('store', { running: starts }).then(
    () => {
      keyView.refresh()
      if (running === null) setStatus(starts ? 'The store is back.' : STOPPED)
    },
    (error) => setStatus(`That did not work: ${error.message}`, 'failed')
  )
})

$('#reset').addEventListener('click', async () => {
  if (running !== null) return
  await control('reset').catch(() => {})
  setStatus('Press a button: both shops get the same requests.')
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
  const { shop, store } = state
  $('#shop-chip').textContent = shop.pid === null ? 'Shop: starting again …' : `Shop: process ${shop.pid}`
  $('#shop-chip').classList.toggle('off', shop.pid === null)
  $('#store-chip').textContent = `Keys ${store.place}${store.running ? '' : ' · stopped'}`
  $('#store-chip').classList.toggle('off', !store.running)
  $('#store').setAttribute('aria-pressed', String(!store.running))
  $('#store b').textContent = store.running ? 'Stop the store' : 'Start the store'
  $('#store span').textContent = store.running ? 'then order' : 'what waits goes on'
  // Not `disabled`: the focus stays where it is.
  for (const button of document.querySelectorAll('[data-play]')) {
    const { needsStore } = scenarios[button.dataset.play]
    const isBusy = running !== null && !(running.id === 'order' && button.dataset.play === 'order')
    button.setAttribute('aria-disabled', String(isBusy || (needsStore === true && !store.running)))
    button.classList.toggle('playing', running?.id === button.dataset.play)
  }
  $('#store').setAttribute('aria-disabled', String(running !== null && running.id !== 'order' && store.running))
  $('#reset').setAttribute('aria-disabled', String(running !== null))
}

fetch('/demo/handler')
  .then((response) => response.text())
  .then((text) => {
    $('#handler').textContent = text
  })
  .catch(() => {})
