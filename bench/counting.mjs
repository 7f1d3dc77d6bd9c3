import { Contestant } from './contestant.mjs'
import { countingProxy } from './wire.mjs'

const REQUESTS = 50

/**
 * Exact figures, one request at a time: round trips, commands and bytes to the store for each path.
 */
export async function countTrips(definition, servers, environment, pathNames) {
  const proxy =
    definition.store === 'redis'
      ? await countingProxy(servers.redisPath, 'redis.sock')
      : await countingProxy(`${servers.postgresAddress.host}/.s.PGSQL.5432`, '.s.PGSQL.5432')
  const contestant = await Contestant.start(definition, {
    redis: { ...environment.redis, path: proxy.path },
    postgres: { ...environment.postgres, host: proxy.folder }
  })
  const counted = {}
  for (const path of pathNames) {
    await contestant.ask('start', { path, size: 'small', warm: 20 })
    // What is done in the background, such as a completion that nobody waits for.
    const settled = () => contestant.ask('idle', { ms: 30 })
    await settled()
    const [before, commandsBefore, writesBefore] = [proxy.seen(), await servers.commands(), await servers.writes()]
    for (let i = 0; i < REQUESTS; i++) await contestant.ask('window', { count: 1 })
    await settled()
    const [after, commandsAfter, writesAfter] = [proxy.seen(), await servers.commands(), await servers.writes()]
    const per = (name) => (after[name] - before[name]) / REQUESTS
    const commands = (isCounted) => {
      if (definition.store !== 'redis') return null
      return (sum(commandsAfter, isCounted) - sum(commandsBefore, isCounted)) / REQUESTS
    }
    counted[path] = {
      trips: per('trips'),
      sent: per('sent'),
      received: per('received'),
      commands: commands((name) => !isScript(name)),
      scripts: commands(isScript),
      writes: definition.store === 'redis' ? (writesAfter - writesBefore) / REQUESTS : null
    }
  }
  await contestant.end()
  proxy.close()
  return counted
}

const isScript = (name) => name.startsWith('eval') || name.startsWith('fcall')

/** How often the commands were called, but the one that asks. */
function sum(counts, isCounted) {
  const calls = Object.entries(counts).filter(([name]) => name !== 'info' && isCounted(name))
  return calls.reduce((total, [, calls]) => total + calls, 0)
}
