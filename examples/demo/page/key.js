/* What the store knows of the key of the last order: asked for whenever something happens to it, and counted down between. */

import { shortKey } from './words.js'

const $ = (id) => document.getElementById(id)
const STATES = {
  free: 'free',
  running: 'claimed',
  abandoned: 'abandoned',
  completed: 'reply stored',
  unknown: 'cannot be asked'
}

export function createKeyView({ isBusy, missing, isDead }) {
  let order = null
  /** What was known at a moment. */
  let known = { state: 'free' }
  let knownAt = 0
  let asking = false
  let askAgain = false
  let longest = 1

  async function refresh() {
    if (order === null) return
    if (missing() !== null) return show()
    if (asking) {
      askAgain = true
      return
    }
    asking = true
    const { key, customer } = order
    const answer = await fetch(`/with/keys/${key}`, { headers: { authorization: `Bearer ${customer}` } })
      .then((response) => (response.ok ? response.json() : { state: 'unknown' }))
      .catch(() => ({ state: 'unknown' }))
    asking = false
    if (order?.key === key) {
      known = answer
      knownAt = performance.now()
      longest = Math.max(answer.leaseMs ?? answer.ttlMs ?? 1, known.state === answer.state ? longest : 1)
      show()
    }
    if (askAgain) {
      askAgain = false
      setTimeout(refresh, 60)
    }
  }

  function show() {
    const state = order !== null && missing() !== null ? 'unknown' : known.state
    const { attempt, steps = [], statusCode } = known
    const left = Math.max(0, (known.leaseMs ?? known.ttlMs ?? 0) - (performance.now() - knownAt))
    $('key').textContent = order === null ? 'no key yet' : shortKey(order.key)
    $('key').title = order?.key ?? ''
    $('key-state').textContent = STATES[state]
    $('key-state').className = `pill ${state}`
    $('key-state').hidden = order === null
    $('key-bar').style.inlineSize = `${left === 0 ? 0 : Math.min(100, (100 * left) / longest)}%`
    $('key-text').textContent = text(left, { state, attempt, steps, statusCode })
  }

  function text(left, { state, attempt, steps, statusCode }) {
    const done = steps.length > 0 ? ` Done: ${steps.join(', ')}.` : ''
    switch (state) {
      case 'running':
        if (isDead())
          return `Attempt ${attempt} held it, and its process is dead: the lease ends in ${(left / 1000).toFixed(1)} s, then the retry runs.${done}`
        return `Attempt ${attempt}; its lease lasts ${(left / 1000).toFixed(1)} s more, and is renewed while its process lives.${done}`
      case 'abandoned':
        return `Attempt ${attempt} did not finish; a retry goes on.${done}`
      case 'completed': {
        const seconds = Math.ceil(left / 1000)
        const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`
        return `Status ${statusCode}, replayed to every retry for ${clock} min more.`
      }
      case 'unknown':
        return `The ${missing() ?? 'shop'} does not answer.${missing() === 'shop' ? ' What is stored stays.' : ''}`
      default:
        return order === null
          ? 'The client makes a key for each order, and keeps it for its retries.'
          : 'Nothing: a request with it will run.'
    }
  }

  setInterval(() => {
    if (order === null || document.hidden) return
    show()
    // A claim may lapse, or be renewed, without anything that is told of.
    if (isBusy() && known.state !== 'completed' && performance.now() - knownAt > 1_000) refresh()
  }, 200)

  return {
    refresh,
    follow(next) {
      order = next
      known = { state: 'free' }
      longest = 1
      show()
    },
    clear() {
      order = null
      known = { state: 'free' }
      show()
    }
  }
}
