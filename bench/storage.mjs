import { Contestant } from './contestant.mjs'

/** Bytes per stored reply with a body of 500 bytes: of the process's memory, or of the server's. */
export async function measureRecord(definition, servers, environment, records) {
  const contestant = await Contestant.start(definition, environment)
  let result
  if (definition.store === 'memory') {
    result = { process: await contestant.ask('memory', { count: records, size: 'small' }) }
  } else {
    await contestant.ask('start', { path: 'first', size: 'small' })
    const before = await servers.memory()
    await contestant.ask('window', { count: records })
    await contestant.ask('idle', { ms: 100 })
    result = {
      server: ((await servers.memory()) - before) / records,
      ...(await sampleOf(environment.redis.db, servers))
    }
    await contestant.ask('close')
  }
  await contestant.end()
  return result
}

/** How long one stored value is, beside its body and headers, and what Redis takes for it and its key. */
async function sampleOf(db, { control }) {
  await control.select(db)
  const key = await control.randomkey()
  const value = (await control.getBuffer(key)).toString('latin1')
  const usage = await control.memory('USAGE', key)
  await control.flushdb()
  await control.select(0)
  const contentType = 'application/json; charset=utf-8'
  const headers = value.includes(contentType) ? 'content-type'.length + contentType.length : 0
  return { overhead: value.length - 500 - headers, usage, key: key.length }
}
