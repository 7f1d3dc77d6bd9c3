import type { Acquisition } from '../../types/index.js'
import type { Pair, Sabotage } from './migrating-scenes.js'

type Store = Pair['from']

/** The store, with other methods for the process that moves. */
function changed(store: Store, methods: Partial<Store>): Store {
  return new Proxy(store, {
    get(target, name) {
      const value = Reflect.get(methods, name) ?? Reflect.get(target, name)
      return typeof value === 'function' ? value.bind(target) : value
    }
  })
}

const yes = async () => true

/** What a store that moves an application must not do, planted below it, by the deploy in which it does harm. */
export const sabotages: Record<string, Record<string, Sabotage>> = {
  'the first deploy': {
    'claims in `to` alone': ({ from, to }) => ({
      from: changed(from, {
        acquire: async () => ({ state: 'acquired', attempt: 1 }),
        renew: yes,
        complete: yes,
        step: yes
      }),
      to
    }),
    'says that it is completed when only `to` has it': ({ from, to }) => ({
      from: changed(from, { complete: yes }),
      to
    }),
    'does not put a record of `to` into `from` before it shows it': ({ from, to }) => {
      const foreign = new Set<string>()
      return {
        from: changed(from, {
          complete: (key, token, record, ttl) =>
            foreign.has(record.fingerprint) ? from.release(key, token, true) : from.complete(key, token, record, ttl)
        }),
        to: changed(to, {
          acquire: async (key, claim) => {
            const found = await to.acquire(key, claim)
            if (found.state === 'completed') foreign.add(found.record.fingerprint)
            return found
          }
        })
      }
    },
    'keeps steps in `to` alone': ({ from, to }) => ({ from: changed(from, { step: yes }), to }),
    'takes the steps of `to` alone': ({ from, to }) => ({ from: changed(from, { acquire: withoutSteps(from) }), to })
  },
  'the second deploy': {
    'claims in `from` alone': ({ from, to }) => ({
      from,
      to: changed(to, {
        acquire: async () => ({ state: 'acquired', attempt: 1 }),
        renew: yes,
        complete: yes,
        step: yes
      })
    }),
    'completes in `from` first': ({ from, to }) => {
      let late: (() => Promise<boolean>) | null = null
      return {
        from: changed(from, {
          complete: async (...args) => (await from.complete(...args)) && (late === null || (await late()))
        }),
        to: changed(to, {
          complete: async (...args) => {
            late = () => to.complete(...args)
            return true
          }
        })
      }
    },
    'says that it is completed when only `from` has it': ({ from, to }) => ({
      from,
      to: changed(to, { complete: yes })
    }),
    'goes on although `to` is taken': ({ from, to }) => ({
      from,
      to: changed(to, {
        acquire: async (key, claim) => {
          const found = await to.acquire(key, claim)
          return found.state === 'running' ? { state: 'acquired', attempt: 1 } : found
        }
      })
    }),
    'does not look into `to` for what is abandoned in `from`': ({ from, to }) => ({
      from,
      to: changed(to, {
        acquire: async (key, claim) =>
          claim.takeover ? to.acquire(key, claim) : { state: 'abandoned', fingerprint: '', attempt: 1 }
      })
    }),
    'keeps steps in `from` alone': ({ from, to }) => ({ from, to: changed(to, { step: yes }) }),
    'takes the steps of `from` alone': ({ from, to }) => ({ from, to: changed(to, { acquire: withoutSteps(to) }) }),
    'raises no attempt': ({ from, to }) => {
      let highest = 0
      const raised = (store: Store): Store['acquire'] => {
        return async (key, claim) => {
          const found = await store.acquire(key, claim)
          if (found.state !== 'acquired') return found
          highest = Math.max(highest, found.attempt)
          return { ...found, attempt: highest }
        }
      }
      return { from: changed(from, { acquire: raised(from) }), to: changed(to, { acquire: raised(to) }) }
    }
  }
}

function withoutSteps(store: Store): Store['acquire'] {
  return async (key, claim) => {
    const { steps: _, ...found } = (await store.acquire(key, claim)) as Acquisition & { steps?: unknown }
    return found as Acquisition
  }
}
