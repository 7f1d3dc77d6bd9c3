import type { NodeRedisClient } from './client.js'
import type { Argument, Link, RedisConnection, Result, Subscriber, SubscriberEvents } from './connection.js'
import { discreet } from './errors.js'
import type { Route, Send, Single } from './node-redis-routes.js'
import { NodeRedisSubscriber } from './node-redis-subscriber.js'

/* Clients of node-redis, the package `redis`. */

/**
 * Text as bytes, whatever else the caller maps. node-redis names the types of replies by the byte that each has in front
 * (`RESP_TYPES` of packages/client/lib/RESP/decoder.ts), which is `$` for text of any length.
 */
const BYTES = { ['$'.charCodeAt(0)]: Buffer }
/**
 * What the caller chooses for all commands may put the last before the first. Its `timeout`, 5 seconds by default in `redis`
 * 6, is for commands that wait to be sent: a timer for each, which take more time than all else here (66 instead of 40 µs
 * per operation). Whoever calls a store has a limit of its own.
 */
const OPTIONS = { typeMapping: BYTES, asap: false, timeout: undefined }
/** CONFIG has names in maps, which bytes cannot be. */
const AS_TEXT = { ...OPTIONS, typeMapping: {} }

const CLOSED = 'The client of node-redis is not connected: call `await client.connect()` before requests come in'

/** A client of node-redis: single, pool, Sentinel or Cluster. */
export class NodeRedisConnection implements RedisConnection {
  readonly #client: NodeRedisClient
  readonly #route: Route
  readonly #named: Naming
  readonly keyPrefix: Argument

  constructor(client: NodeRedisClient, route: Route) {
    this.#client = client
    this.#route = route
    // `sendCommand` leaves it out, which there is from 6.2 on: for ioredis it is part of a key.
    this.keyPrefix = (client as { _keyPrefix?: Argument })._keyPrefix ?? ''
    this.#named = namingBy(this.keyPrefix)
  }

  get isCluster(): boolean {
    return this.#route.isCluster
  }

  evaluate(
    command: 'EVALSHA' | 'EVAL',
    script: string,
    keys: readonly string[],
    args: readonly Argument[]
  ): Promise<unknown> {
    const names = keys.map(this.#named)
    return this.#about(names[0], (send) => evaluate(send, command, script, names, args))
  }

  setOrGet(key: string, value: Argument, expiry: string): Promise<unknown> {
    const name = this.#named(key)
    return this.#about(name, (send) => send(['SET', name, value, 'PX', expiry, 'NX', 'GET'], OPTIONS))
  }

  getWithTtl(key: string): Promise<readonly Result[]> {
    const name = this.#named(key)
    return this.#about(name, (send) => inARow(send, ['GET', name], ['PTTL', name]))
  }

  scan(cursor: string, match: Buffer, count: number): Promise<readonly Result[]> {
    const scan = ['SCAN', cursor, 'MATCH', match, 'COUNT', String(count)]
    return this.#about(undefined, (send) => inARow(send, scan, ['INFO', 'server']))
  }

  slots(): Promise<unknown> {
    return this.#about(undefined, (send) => send(['CLUSTER', 'SLOTS'], AS_TEXT))
  }

  async hold<T>(use: (link: Link) => Promise<T>): Promise<T> {
    this.#assertOpen()
    try {
      return await this.#route.lend((client) => use(new NodeRedisLink(client, this.#named)))
    } catch (error) {
      throw discreet(error)
    }
  }

  config(pattern: string): Promise<unknown> {
    return this.#about(undefined, (send) => send(['CONFIG', 'GET', pattern], AS_TEXT))
  }

  listen(events: SubscriberEvents): Subscriber {
    return new NodeRedisSubscriber(async (duplicate) => {
      this.#assertOpen()
      return this.#route.lend(async (client) => duplicate(client))
    }, events)
  }

  async #about<T>(key: Argument | undefined, use: (send: Send) => Promise<T>): Promise<T> {
    this.#assertOpen()
    try {
      return await this.#route.about(key, use)
    } catch (error) {
      throw discreet(error)
    }
  }

  /** Else some kinds of clients wait for ever, and others fail with words that do not help. */
  #assertOpen(): void {
    if (!this.#client.isOpen) throw new Error(CLOSED)
  }
}

/** One connection of a client. */
class NodeRedisLink implements Link {
  readonly #client: Single
  readonly #send: Send
  readonly #named: Naming

  constructor(client: Single, named: Naming) {
    this.#client = client
    this.#send = (args, options) => client.sendCommand(args, options)
    this.#named = named
  }

  /** Counted up before anything that has waited for a connection goes by it (packages/client/lib/client/socket.ts). */
  get identity(): number {
    const { socketEpoch } = this.#client
    if (socketEpoch === undefined) throw new Error('This client of node-redis does not tell of new connections')
    return socketEpoch
  }

  evaluate(
    command: 'EVALSHA' | 'EVAL',
    script: string,
    keys: readonly string[],
    args: readonly Argument[]
  ): Promise<unknown> {
    return evaluate(this.#send, command, script, keys.map(this.#named), args)
  }

  setAndWait(key: string, replicas: number, timeout: number): Promise<readonly Result[]> {
    const set = ['SET', this.#named(key), '', 'PX', String(timeout)]
    return inARow(this.#send, set, ['WAIT', String(replicas), String(timeout)])
  }
}

type Naming = (key: string) => Argument

function namingBy(prefix: Argument): Naming {
  if (prefix.length === 0) return (key) => key
  if (typeof prefix === 'string') return (key) => prefix + key
  return (key) => Buffer.concat([prefix, Buffer.from(key)])
}

function evaluate(
  send: Send,
  command: string,
  script: string,
  names: readonly Argument[],
  args: readonly Argument[]
): Promise<unknown> {
  return send([command, script, String(names.length), ...names, ...args], OPTIONS)
}

/**
 * Two commands, the one right behind the other. When the connection is lost between them, the second goes by no other: that
 * is what a chain is in node-redis (`flushWaitingForReply` of packages/client/lib/client/commands-queue.ts).
 * Rejects when the first fails, from which a client by Sentinel learns that it needs another master.
 */
async function inARow(send: Send, ...commands: [Argument[], Argument[]]): Promise<Result[]> {
  const options = { ...OPTIONS, chainId: Symbol('fastify-idempotency') }
  const results = await Promise.all(
    commands.map((args) =>
      send(args, options).then(
        (result): Result => [null, result],
        (error): Result => [error, undefined]
      )
    )
  )
  const [error] = results[0] as Result
  if (error !== null) throw error
  return results
}
