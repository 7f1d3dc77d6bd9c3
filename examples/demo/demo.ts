import type { FastifyInstance } from 'fastify'
import type { Settings } from '../settings.js'
import { Feed } from './feed.js'
import { buildFront } from './front.js'
import { ShopProcess } from './shop-process.js'
import { buildWorld, World } from './world.js'

/**
 * The demo: the page, the services that the shop calls, and the shop in a process that can be killed.
 * @param where.onSlowMachine Nothing is taken for dead, or silent, before it has had its time.
 */
export async function startDemo(
  settings: Settings,
  where: { host: string; port: number; onSlowMachine?: boolean }
): Promise<{ url: string; close(): Promise<void> }> {
  const { host, port, onSlowMachine = false } = where
  const feed = new Feed(() => ({
    wanted: world.wanted,
    books: world.books,
    store: { place: settings.place, survives: settings.survives, running: !shop.storeIsStopped },
    shop: { pid: shop.pid }
  }))
  const world = new World(feed)
  const services = await buildWorld(world, feed)
  const { databaseUrl, redisUrl } = settings
  const env = {
    WORLD_URL: await services.listen({ host: '127.0.0.1', port: 0 }),
    ...(onSlowMachine && { SLOW_MACHINE: '1' }),
    ...(databaseUrl !== undefined && { DATABASE_URL: databaseUrl }),
    ...(redisUrl !== undefined && { REDIS_URL: redisUrl })
  }
  const shop = new ShopProcess(env, {
    onHappening: (happening) => feed.tell(happening.what, happening),
    onRun: (side) => world.books[side].runs++,
    onKilled: (pid) => feed.tell('killed', { pid }),
    onStarted: (pid) => feed.tell('started', { pid })
  })
  const front: FastifyInstance = buildFront({ shop, world, feed })
  await shop.start()
  const url = await front.listen({ host, port })
  const close = async () => {
    world.go()
    await front.close()
    await shop.close()
    await services.close()
  }
  return { url, close }
}
