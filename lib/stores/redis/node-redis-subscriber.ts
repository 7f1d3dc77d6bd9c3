import type { Subscriber, SubscriberEvents } from './connection.js'
import type { Single } from './node-redis-routes.js'

/* A connection of node-redis that listens. */

/**
 * One that lives until it is lost, and is replaced then. node-redis would connect it again by the caller's rules, which may
 * end, and by itself subscribe what nobody listens to any more.
 */
export class NodeRedisSubscriber implements Subscriber {
  readonly #client: Promise<Single>
  readonly #events: SubscriberEvents
  /** The last command about a channel that is not answered yet. */
  readonly #underWay = new Map<string, Promise<void>>()
  #isOver = false

  /** @param create Calls what it is given with a client to be like. */
  constructor(create: (duplicate: (client: Single) => Single) => Promise<Single>, events: SubscriberEvents) {
    this.#events = events
    this.#client = this.#connect(create)
    // Not before whoever subscribes has heard that it fails: who is told of an end looks again at once.
    this.#client.catch(() => setImmediate(() => this.#end()))
  }

  subscribe(channel: string): Promise<void> {
    return this.#inTurn(channel, (client) => client.subscribe(channel, this.#hear))
  }

  unsubscribe(channel: string): Promise<void> {
    return this.#inTurn(channel, (client) => client.unsubscribe(channel, this.#hear))
  }

  disconnect(): void {
    this.#isOver = true
    // Not while it connects: redis 5 would forget the socket then, and leave it open.
    this.#client.then(
      (client) => {
        if (client.isOpen) client.destroy()
      },
      () => {}
    )
  }

  async #connect(create: (duplicate: (client: Single) => Single) => Promise<Single>): Promise<Single> {
    const client = await create(duplicate)
    // Without a listener an error would end the process. It is the one sign of a loss that all versions give.
    let stands = false
    client.on('error', () => {
      if (stands) this.#end()
    })
    await client.connect()
    stands = true
    return client
  }

  #end(): void {
    if (this.#isOver) return
    this.disconnect()
    this.#events.ended()
  }

  readonly #hear = (_message: string, channel: string): void => {
    this.#events.message(channel)
  }

  /**
   * One command about a channel after the other. node-redis takes who subscribes while UNSUBSCRIBE is on its way for
   * subscribed, where SUBSCRIBE was when that was sent (packages/client/lib/client/pub-sub.ts, `unsubscribing`).
   */
  #inTurn(channel: string, command: (client: Single) => Promise<void>): Promise<void> {
    const send = async () => command(await this.#client)
    const turn = (this.#underWay.get(channel) ?? Promise.resolve()).then(send, send)
    this.#underWay.set(channel, turn)
    const forget = () => {
      if (this.#underWay.get(channel) === turn) this.#underWay.delete(channel)
    }
    turn.then(forget, forget)
    return turn
  }
}

/** What is the caller's for commands does not end one that is silent for long, nor does it cache anything. */
function duplicate(client: Single): Single {
  return client.duplicate({
    socket: { ...client.options?.socket, reconnectStrategy: false, socketTimeout: undefined },
    clientSideCache: undefined,
    emitInvalidate: undefined,
    commandsQueueMaxLength: undefined
  })
}
