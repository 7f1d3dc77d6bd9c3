/* What the timeline says of what happens. */

export const money = (cents) => `€${(cents / 100).toFixed(2)}`

export const shortKey = (key) => `${key.slice(0, 8)}…`

export const name = (customer) => (customer ? customer[0].toUpperCase() + customer.slice(1) : 'somebody')

const DIFFERENCE = { payload: 'another payload', target: 'another target', credentials: 'other credentials' }

/** Each: the kind, which gives it its colour, and the text. */
const WORDS = {
  // The client
  begin: ({ title }) => ['title', title],
  again: () => ['plain', 'Clicked again while the first was on its way: the same key'],
  cut: () => ['bad', 'The connection is cut: the client does not know what became of its order'],
  lost: ({ status }) => [
    'bad',
    status ? `The client got ${status}, and will send it again` : 'The client got no reply'
  ],
  // The shop
  arrived: ({ customer, key }) => ['plain', `${name(customer)} orders${key ? `, key ${shortKey(key)}` : ''}`],
  ran: ({ attempt, side }) => ['run', side === 'with' ? `The handler runs, attempt ${attempt}` : 'The handler runs'],
  replied: ({ status, replayed }) => [
    replayed ? 'good' : status < 400 ? 'plain' : 'bad',
    replayed ? `Reply ${status}, Idempotent-Replayed: true` : `Reply ${status}`
  ],
  'hung-up': () => ['plain', 'The client is gone. The handler goes on'],
  // The plugin
  acquired: ({ attempt }) => ['good', `Key claimed, attempt ${attempt}, under a lease`],
  replayed: () => ['good', 'The stored reply is sent again: the handler does not run'],
  conflict: () => ['bad', 'Refused: a request with this key still runs'],
  mismatch: ({ differs }) => ['bad', `Refused: the key was used with ${DIFFERENCE[differs] ?? 'another request'}`],
  stored: ({ late }) => ['good', late ? 'The store has the reply now' : 'The reply is stored, before it is sent'],
  released: () => ['plain', 'The reply is not final: the key is given back, finished steps are kept'],
  tombstoned: () => ['bad', 'The reply could not be kept'],
  takeover: ({ attempt }) => ['good', `Goes on after attempt ${attempt - 1}, which did not finish`],
  'lease-lost': () => ['bad', 'The claim was lost'],
  'store-error': () => ['bad', 'The store does not answer: nothing begins unprotected'],
  bypassed: () => ['bad', 'Runs without protection'],
  refused: ({ code }) => ['bad', `Refused: ${code}`],
  'step-stored': ({ step }) => ['good', `Step “${step}” is done, and kept`],
  'step-resumed': ({ step }) => ['good', `Step “${step}” was done before: not done again`],
  settled: () => ['plain', 'Settled'],
  // The others
  charged: ({ amount }) => ['money', `Provider: ${money(amount)} charged`],
  'payment-known': () => ['good', 'Provider: knows this key, charges nothing more'],
  parcel: ({ order }) => ['run', `Warehouse: parcel ${order} is sent`],
  'parcel-known': () => ['good', 'Warehouse: knows this key, sends nothing more'],
  'parcel-failed': () => ['bad', 'Warehouse: fails, 503'],
  killed: ({ pid }) => ['system', `Process ${pid} killed by SIGKILL`],
  started: ({ pid }) => ['system', `Process ${pid} serves both shops`],
  'store-stopped': () => ['system', 'The store is stopped'],
  'store-started': () => ['system', 'The store is back']
}

export function describe(happening) {
  return (WORDS[happening.what] ?? (({ what }) => ['plain', what]))(happening)
}

/** The text, which may be broken behind each `_`. */
export function breakable(text) {
  const [first, ...others] = text.split(/(?<=_)/)
  return [first, ...others.flatMap((part) => [document.createElement('wbr'), part])]
}
