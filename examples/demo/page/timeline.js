/* The timeline: a list in the order in which things happened, whoever tells of them. */

import { breakable, describe } from './words.js'

const LABELS = { with: 'with', without: 'without' }
const LONGEST = 600

export function createTimeline(list) {
  const empty = list.firstElementChild
  /** Of the shown, in order. */
  let times = []
  /** What the times are counted from. */
  let start = 0

  function entry(happening) {
    const [kind, text] = describe(happening)
    const item = document.createElement('li')
    item.className = kind
    item.dataset.what = happening.what
    if (happening.side) item.dataset.side = happening.side
    if (kind === 'title') start = happening.at
    const time = document.createElement('time')
    time.textContent = kind === 'title' ? '' : `${Math.max(0, (happening.at - start) / 1000).toFixed(2)} s`
    const side = document.createElement('span')
    side.className = 'who'
    side.textContent = LABELS[happening.side] ?? ''
    const what = document.createElement('span')
    what.className = 'what'
    what.append(...breakable(text))
    item.append(time, side, what)
    return item
  }

  return {
    add(happening) {
      const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40
      // That it has begun is no news.
      if (times.length === 0 && happening.what === 'started') return
      empty.remove()
      if (start === 0) start = happening.at
      const item = entry(happening)
      // Two processes and the page tell: what was earlier may come later.
      let place = times.length
      while (place > 0 && times[place - 1] > happening.at) place--
      list.insertBefore(item, list.children[place] ?? null)
      times.splice(place, 0, happening.at)
      if (times.length > LONGEST) {
        list.firstElementChild.remove()
        times.shift()
      }
      if (atEnd) list.scrollTop = list.scrollHeight
    },
    clear() {
      times = []
      start = 0
      list.replaceChildren(empty)
    }
  }
}
