import type { IdempotencyStore, StoredReply, StoredStep } from '../../types/index.js'
import type { Event } from './plugin-history.js'
import { isTransactional, LEASE, type Route, type StepName, TTL } from './plugin-world.js'

// What stands between the plugin and its store and is wrong in one thing, with the shortest history that shows it.

type Store = Required<Omit<IdempotencyStore, 'begin' | 'close'>>

export interface Sabotage {
  between: (store: IdempotencyStore) => IdempotencyStore
  events: Event[]
}

const never = new Promise<never>(() => {})

const send = (to: number, route: Route = '/reject', payload = 'p'): Event => ({
  do: 'send',
  to,
  key: 'k',
  payload,
  route
})
const end = (how: 'reply' | 'fail' | 'too large'): Event => ({ do: 'end', which: 0, how })
/** A step, of the run that has started first. */
const step = (name: StepName): Event => ({ do: 'step', which: 0, name, how: 'done' })
const pass = (ms: number): Event => ({ do: 'pass', ms })

const wrong = (change: (store: Store) => Partial<IdempotencyStore>, ...events: Event[]): Sabotage => ({
  between: (store) => {
    const right = store as Store
    return {
      acquire: (key, claim) => right.acquire(key, claim),
      renew: (key, token, leaseMs) => right.renew(key, token, leaseMs),
      complete: (key, token, record, ttlMs) => right.complete(key, token, record, ttlMs),
      step: (key, token, step) => right.step(key, token, step),
      release: (key, token, unused) => right.release(key, token, unused),
      changed: (key, signal) => right.changed(key, signal),
      get: (key) => right.get(key),
      delete: (key) => right.delete(key),
      ...change(right)
    }
  },
  events
})

export const sabotages = {
  'replies are not kept': wrong(
    (store) => ({ complete: (key, token) => store.release(key, token) }),
    send(0),
    end('reply'),
    send(0)
  ),
  'releases do not arrive': wrong(() => ({ release: async () => true }), send(0), end('fail'), send(0)),
  'renewals do not arrive': wrong(() => ({ renew: async () => true }), send(0), pass(LEASE + 1_000), send(1)),
  'payloads are not compared': wrong(
    (store) => ({
      acquire: async (key, claim) => {
        const found = await store.acquire(key, claim)
        if (found.state === 'completed') return { ...found, record: { ...found.record, fingerprint: '' } }
        return found
      }
    }),
    send(0),
    end('reply'),
    send(0, '/reject', 'q')
  ),
  'who waits is not told, and looks in vain': wrong(
    (store) => {
      const busy = new Set<string>()
      return {
        acquire: async (key, claim) => {
          if (busy.has(key)) return { state: 'running', fingerprint: '', leaseMs: LEASE }
          const found = await store.acquire(key, claim)
          if (found.state === 'running') busy.add(key)
          return found
        },
        changed: () => never
      }
    },
    send(0, '/wait'),
    send(1, '/wait'),
    end('reply'),
    pass(5_000)
  ),
  'tombstones are replies': wrong(
    (store) => ({
      acquire: async (key, claim) => {
        const found = await store.acquire(key, claim)
        if (found.state !== 'completed' || found.record.kind === 'reply') return found
        const { fingerprint, createdAt } = found.record
        const empty: StoredReply = {
          kind: 'reply',
          fingerprint,
          createdAt,
          statusCode: 200,
          headers: [],
          body: Buffer.alloc(0),
          text: true
        }
        return { ...found, record: empty }
      }
    }),
    send(0),
    end('too large'),
    send(0)
  ),
  'keys are not deleted': wrong(
    (store) => ({ delete: async (key) => (await store.get(key)) !== null }),
    send(0),
    end('reply'),
    { do: 'delete', process: 0, key: 'k' },
    send(0)
  ),
  'attempts are not counted': wrong(
    (store) => ({
      acquire: async (key, claim) => {
        const found = await store.acquire(key, claim)
        return found.state === 'acquired' ? { ...found, attempt: 1 } : found
      }
    }),
    send(0),
    { do: 'crash', process: 0 },
    pass(LEASE + 1_000),
    send(1)
  ),
  'replies are kept for ever': wrong(
    (store) => ({ complete: (key, token, record) => store.complete(key, token, record, null) }),
    send(0),
    end('reply'),
    pass(TTL + 5_000),
    send(0)
  ),
  'late replies overwrite the claim of another': wrong(
    (store) => ({
      complete: async (key, token, record, ttlMs) => {
        await store.delete(key)
        await store.acquire(key, { token, fingerprint: '', leaseMs: LEASE, retainMs: LEASE, takeover: true })
        return store.complete(key, token, record, ttlMs)
      }
    }),
    send(0),
    { do: 'cut', process: 0 },
    pass(LEASE + 1_000),
    send(1),
    { do: 'mend', process: 0 },
    end('reply'),
    send(1)
  ),
  'steps do not arrive': wrong(() => ({ step: async () => true }), send(0), step('a'), end('fail'), send(0)),
  'steps are forgotten at a release': wrong(
    (store) => ({
      release: async (key, token, unused) =>
        (await store.release(key, token, unused)) && ((await store.get(key)) === null || store.delete(key))
    }),
    send(0),
    step('a'),
    end('fail'),
    send(0)
  ),
  'steps are not given to who comes next': wrong(
    (store) => ({
      acquire: async (key, claim) => {
        const found = await store.acquire(key, claim)
        return found.state === 'acquired' ? { state: 'acquired', attempt: found.attempt } : found
      }
    }),
    send(0),
    step('a'),
    end('fail'),
    send(0),
    step('a')
  ),
  'steps are stored for whoever asks': {
    between: (() => {
      const owners = new Map<string, string>()
      return (store: IdempotencyStore) => {
        const { between } = wrong((right) => ({
          acquire: async (key, claim) => {
            const found = await right.acquire(key, claim)
            if (found.state === 'acquired') owners.set(key, claim.token)
            return found
          },
          step: (key, token, step) => right.step(key, owners.get(key) ?? token, step)
        }))
        return between(store)
      }
    })(),
    events: [send(0), { do: 'delete', process: 1, key: 'k' }, send(1), step('a')]
  },
  'the result of a step is overwritten by a later one': wrong(
    (store) => {
      let last: StoredStep | null = null
      return {
        step: (key, token, step) => {
          last = step
          return store.step(key, token, step)
        },
        acquire: async (key, claim) => {
          const found = await store.acquire(key, claim)
          if (found.state !== 'acquired' || found.steps === undefined || last === null) return found
          const [, result] = last
          return { ...found, steps: found.steps.map(([name]) => [name, result] as const) }
        }
      }
    },
    send(0),
    step('a'),
    end('fail'),
    send(0),
    step('b'),
    end('fail'),
    send(0),
    step('a'),
    step('b')
  ),
  'steps are not stored again when a claim is made anew': wrong(
    (store) => {
      const stored = new Set<string>()
      return {
        step: (key, token, step) => {
          if (stored.has(step[1])) return Promise.resolve(true)
          stored.add(step[1])
          return store.step(key, token, step)
        }
      }
    },
    send(0),
    step('a'),
    { do: 'forget' },
    pass(LEASE),
    end('fail'),
    send(0)
  ),
  'a step is committed under a claim that was lost': wrong(
    (store) => ({
      step: (key, token, step) => (isTransactional(step[0]) ? Promise.resolve(true) : store.step(key, token, step))
    }),
    send(0),
    { do: 'delete', process: 1, key: 'k' },
    send(1),
    step('t')
  )
} satisfies Record<string, Sabotage>
