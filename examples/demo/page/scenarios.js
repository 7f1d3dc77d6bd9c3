/* What the buttons do, to both shops alike. */

/** In cents. */
const PRICE = 4200
const OTHER_PRICE = 9900

const SIDES = ['with', 'without']
const both = (act) => Promise.all(SIDES.map(act))

const AWAY = 'While the store was away the plugin let nothing run: 503, and the client kept its key.'

/** After a time without the store, when everything had the same key. */
const TOGETHER =
  'When it was back, all requests with this key went through as one order. The other shop ran each of them at once.'

/**
 * Each has a title, what was meant to be bought, whether it needs the store, what it does, and what there is to be seen:
 * `done`, or `forgetful` where the keys died with the process, `again` after more than one click, and `back` when the store
 * was away for a while. `meanwhile` is said when such a thing happens.
 * `send(side, order)` sends until there is a reply; `sendOnce` does not send again; `control` asks the demo itself.
 */
export const scenarios = {
  order: {
    title: 'Order',
    run: ({ send, order }) => both((side) => send(side, order)),
    done: 'One order, one charge, on both sides. Now make it harder.',
    again:
      'Whoever clicks again sends the same key, and gets the reply of the first click. Without the plugin each click was another order.',
    back: 'When it was back, the same key went through, once. The other shop ran at once, and would have run a retry again.'
  },
  double: {
    title: 'Double click',
    run: ({ send, order }) => both((side) => Promise.all([send(side, order), send(side, order)])),
    done: 'The second click waited for the reply of the first, and got the same one. Without the plugin it was another order.',
    back: TOGETHER
  },
  five: {
    title: 'Five at once',
    run: ({ send, order }) => Promise.all([1, 2, 3, 4, 5].map(() => both((side) => send(side, order)))),
    done: 'Five requests, one handler, five equal replies. Without the plugin: five orders.',
    back: TOGETHER
  },
  cut: {
    title: 'Cut the connection, and retry',
    needsStore: true,
    async run({ send, sendOnce, order, control, happened, note }) {
      await control('next', { holdPayments: true })
      const paid = happened('charged')
      const connection = new AbortController()
      const lost = both((side) => sendOnce(side, order, connection.signal))
      await paid
      const gone = happened('hung-up')
      note('cut')
      connection.abort()
      await Promise.all([lost, gone])
      await control('go')
      await both((side) => send(side, order))
    },
    done: 'The handler went on without its client, and its reply was stored: the retry got it. Without the plugin the customer paid twice.'
  },
  kill: {
    title: 'Kill the process in mid-payment, and retry',
    needsStore: true,
    async run({ send, order, control }) {
      await control('next', { kill: true })
      await both((side) => send(side, order))
    },
    meanwhile: {
      killed: (survives) =>
        survives
          ? 'The money is taken, and the process is dead. The retry waits: attempt 1 has the key until its lease ends. Without the plugin the retry pays again as soon as there is a shop.'
          : 'The money is taken, and the process is dead, and its keys with it. The retry runs as soon as there is a shop.'
    },
    done: 'The money was taken, and nobody was left to say so. When the lease of the dead process was over, the retry ran as attempt 2: it asked the provider with the same key, and nothing was charged again.',
    forgetful:
      'The money was taken, and the keys went with the process, because this store is in its memory: the retry ran like a first attempt. The key that the provider gets is the same, so nothing was charged again.'
  },
  half: {
    title: 'Fail half-way: paid, but no parcel',
    needsStore: true,
    async run({ send, order, control }) {
      await control('next', { failParcels: true })
      await both((side) => send(side, order))
    },
    done: 'The retry went on behind the step that was done: only the parcel was missing. Without the plugin it began with the payment.'
  },
  amount: {
    title: 'Change the amount under the same key',
    async run({ send, order }) {
      await both((side) => send(side, order))
      await both((side) => send(side, { ...order, amount: OTHER_PRICE }))
    },
    done: 'Another payload under a used key is a mistake of the client: 422, and the first reply stays. Without the plugin it was charged.'
  },
  user: {
    title: 'Another user with the same key',
    orders: 2,
    async run({ send, order }) {
      await both((side) => send(side, order))
      await both((side) => send(side, { ...order, customer: 'bob' }))
    },
    done: 'Keys belong to their users: Bob’s order is one of its own, and he was not shown Alice’s. So two orders are right.'
  }
}

/**
 * What there is to be seen, when it is over. `away` tells what came of a time without the store: requests were `refused`, or
 * had their key already, so that their reply is stored `later`.
 */
export function closing({ done, forgetful, again = done, back }, { survives, clicks, away }) {
  if (away === 'refused') return `${AWAY} ${clicks > 1 ? TOGETHER : (back ?? done)}`
  if (away === 'later')
    return 'The handler ran already when the store went away, so it went on, and the client got its reply. The plugin stores it as soon as the store is back.'
  if (!survives && forgetful) return forgetful
  return clicks > 1 ? again : done
}

export const newOrder = () => ({
  key: crypto.randomUUID?.() ?? `key-${Date.now()}-${Math.random().toString(36).slice(2)}`,
  customer: 'alice',
  item: 'The Mythical Man-Month',
  amount: PRICE
})
