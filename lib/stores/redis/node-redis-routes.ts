import { Batch } from '../../util/batch.js'
import type { Argument } from './connection.js'
import { discreet, isReadOnly } from './errors.js'

/*
 * How commands go to a server by the four kinds of node-redis clients. What of them is used is the same in `redis` 5 and 6
 * (packages/client/lib of https://github.com/redis/node-redis: client/index.ts, client/pool.ts, sentinel/index.ts,
 * cluster/index.ts).
 */

/** What `createClient` gives. */
export interface Single {
  readonly isOpen: boolean
  readonly isReady: boolean
  readonly options?: { readonly socket?: object }
  /** One more with each connection. */
  readonly socketEpoch?: number
  connect(): Promise<unknown>
  destroy(): void
  duplicate(overrides: object): Single
  on(event: 'error', listener: () => void): unknown
  sendCommand(args: readonly Argument[], options: object): Promise<unknown>
  subscribe(channel: string, listener: (message: string, channel: string) => void): Promise<void>
  unsubscribe(channel: string, listener: (message: string, channel: string) => void): Promise<void>
}

/** What `createClientPool` gives. */
export interface Pool {
  execute<T>(use: (client: Single) => Promise<T>): Promise<T>
}

/** What `createSentinel` gives. */
export interface Sentinel {
  /** Waits for a master, and looks for another one upon READONLY. It is a public type, of which `multi()` is made. */
  _execute<T>(isReadonly: boolean, use: (client: Single) => Promise<T>): Promise<T>
}

/** What `createCluster` gives. */
export interface Cluster {
  readonly masters: readonly { readonly client?: { readonly isReady: boolean } }[]
  getRandomNode(): object
  nodeClient(node: object): Promise<Single>
  sendCommand(
    key: Argument | undefined,
    isReadonly: boolean,
    args: readonly Argument[],
    options: object
  ): Promise<unknown>
}

/** Sends one command. */
export type Send = (args: readonly Argument[], options: object) => Promise<unknown>

/** Who comes later than that does not join who looks for a master, but looks anew. */
const LONGEST_LOOK_MS = 1_000

type Use<T> = (client: Single) => Promise<T>

export interface Route {
  readonly isCluster: boolean
  /** Sends commands about one key: those of one turn of the event loop go the one right behind the other. */
  about<T>(key: Argument | undefined, use: (send: Send) => Promise<T>): Promise<T>
  /** Lends one connection: in a Cluster to any of its servers. */
  lend<T>(use: Use<T>): Promise<T>
}

/** What is sent in one turn of the event loop, `createClient` writes at once: there is nothing to be gathered here. */
export function single(client: Single): Route {
  const send = sendBy(client)
  return { isCluster: false, about: (_, use) => use(send), lend: (use) => use(client) }
}

/** One connection is lent to all who ask in one turn of the event loop: whoever has one has it alone. */
export function pool(pool: Pool): Route {
  const due = new Batch<Use<unknown>, unknown>((uses) =>
    pool.execute((client) => Promise.all(uses.map((use) => use(client).catch(discreet))))
  )
  return {
    isCluster: false,
    about: <T>(_: unknown, use: (send: Send) => Promise<T>) => due.ask((client) => use(sendBy(client))) as Promise<T>,
    lend: (use) => pool.execute(use)
  }
}

const sentinels = new WeakMap<object, Route>()

/**
 * By one of the connections to the master, that others may use as well: like the `sendCommand` of the whole, but that one
 * may have two commands go by two connections. What fails because the master is gone is tried once more, with the next one.
 *
 * It is the same for all stores on one client: when several ask a Sentinel client at once that has nothing under way, each
 * takes a connection, and all but the last are never given back (`#masterClientInfo ??= await` in `_execute` of
 * sentinel/index.ts, 6.3). Who comes when none is left waits for ever.
 */
export function sentinel(sentinel: Sentinel): Route {
  const { _self: self = sentinel } = sentinel as { _self?: object }
  let route = sentinels.get(self)
  if (route === undefined) {
    route = followed(sentinel)
    sentinels.set(self, route)
  }
  return route
}

function followed(sentinel: Sentinel): Route {
  let current: Single | undefined
  let looking: Promise<Single> | undefined
  const look = (failed?: Single, error?: unknown): Promise<Single> => {
    if (looking !== undefined) return looking
    const look = sentinel._execute(false, async (client) => {
      if (client === failed && isReadOnly(error)) throw error
      return client
    })
    looking = look
    const isOver = () => {
      clearTimeout(timer)
      if (looking === look) looking = undefined
    }
    // It may be one that waits for ever, as above, for what others send by the client.
    const timer = setTimeout(isOver, LONGEST_LOOK_MS).unref()
    look.then(isOver, isOver)
    return look
  }
  const lend = async <T>(use: Use<T>): Promise<T> => {
    if (!current?.isReady) current = await look()
    const client = current
    try {
      return await use(client)
    } catch (error) {
      if (client.isReady && !isReadOnly(error)) throw error
      current = await look(client, error)
      return use(current)
    }
  }
  return { isCluster: false, about: (_, use) => lend((client) => use(sendBy(client))), lend }
}

export function cluster(cluster: Cluster): Route {
  return {
    isCluster: true,
    about: (key, use) => use((args, options) => cluster.sendCommand(key, false, args, options)),
    lend: async (use) => {
      const ready = cluster.masters.filter(({ client }) => client?.isReady)
      return use(await cluster.nodeClient(ready[Math.floor(Math.random() * ready.length)] ?? cluster.getRandomNode()))
    }
  }
}

function sendBy(client: Single): Send {
  return (args, options) => client.sendCommand(args, options)
}
