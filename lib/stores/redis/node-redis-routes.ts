import { Batch } from '../../util/batch.js'
import type { Argument } from './connection.js'
import { discreet } from './errors.js'

/*
 * How commands go to a server by the four kinds of node-redis clients. What of them is used is the same in `redis` 5 and 6
 * (packages/client/lib of https://github.com/redis/node-redis: client/index.ts, client/pool.ts, sentinel/index.ts,
 * cluster/index.ts).
 */

/** What `createClient` gives. */
export interface Single {
  readonly isOpen: boolean
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
  use<T>(use: (lease: Lease) => Promise<T>): Promise<T>
}

/** One connection to the master, for as long as it is lent. */
interface Lease {
  /** Its type is public, and its `multi()` is made of it. It looks for another master, and tries again, where that is of use. */
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
  const send: Send = (args, options) => client.sendCommand(args, options)
  return { isCluster: false, about: (_, use) => use(send), lend: (use) => use(client) }
}

export function pool(pool: Pool): Route {
  return lent((uses) => pool.execute((client) => settled(uses.map(async (use) => use(client)))))
}

/**
 * By `use`, and never by the `sendCommand` of the whole: that shares a connection among those who come while it is in use,
 * so that who found none waits until nobody comes any more (`_execute` of sentinel/index.ts, 6.3). And two commands may
 * go by two of its connections.
 */
export function sentinel(sentinel: Sentinel): Route {
  return lent((uses) => sentinel.use((lease) => settled(uses.map((use) => lease._execute(false, use)))))
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

/** One connection is lent to all who ask in one turn of the event loop. Each has it alone, and there may be one only. */
function lent(lendAll: (uses: Use<unknown>[]) => Promise<unknown[]>): Route {
  const due = new Batch<Use<unknown>, unknown>(lendAll)
  const lend = <T>(use: Use<T>) => due.ask(use) as Promise<T>
  return {
    isCluster: false,
    about: (_, use) => lend((client) => use((args, options) => client.sendCommand(args, options))),
    lend
  }
}

/** Answers, or errors in their place. */
function settled(answers: Promise<unknown>[]): Promise<unknown[]> {
  return Promise.all(answers.map((answer) => answer.catch(discreet)))
}
