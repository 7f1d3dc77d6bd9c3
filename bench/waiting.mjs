import { spread } from './statistics.mjs'

/**
 * Duplicates that wait for a running request: what it takes to answer them all, against as many replays at once; what
 * their coming costs, and what the store hears of it.
 */
export async function measureWaiting(contestant, servers, { waiters, repeats }) {
  const { store } = contestant.definition
  const seen = { wall: [], cpu: [], gathered: [], channels: [], delay: [] }
  // Once to warm up, where that is not done by their number.
  for (let i = waiters < 1_000 ? -1 : 0; i < repeats; i++) {
    const gathered = await contestant.ask('gather', { waiters, size: 'small' })
    const channels = store === 'redis' ? (await servers.control.pubsub('CHANNELS')).length : null
    const { answered, replayed } = await contestant.ask('answer')
    await contestant.ask('close')
    if (i < 0) continue
    seen.wall.push(answered.wall / replayed.wall)
    seen.cpu.push(answered.cpu / replayed.cpu)
    seen.gathered.push(gathered.cpu / replayed.cpu)
    seen.delay.push(longest(answered) / longest(replayed))
    if (channels !== null) seen.channels.push(channels)
  }
  return {
    wall: spread(seen.wall),
    cpu: spread(seen.cpu),
    gathered: spread(seen.gathered),
    delay: spread(seen.delay),
    channels: seen.channels.length > 0 ? Math.max(...seen.channels) : null
  }
}

/** The longest delay of the event loop, in milliseconds. What is shorter than the clock's own step is that step. */
function longest({ delay }) {
  return Math.max(delay.max, 1)
}
