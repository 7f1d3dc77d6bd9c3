import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { SqliteStore } from '../../index.js'
import { Log } from '../../lib/stores/sqlite/log.js'
import { type Latch, latch, until } from '../support/latch.js'
import { makeFolder } from '../support/process.js'
import { sqliteDrivers } from '../support/sqlite.js'
import { claim, reply, take } from '../support/store-fixtures.js'

/* What is answered is on the disk, and the process does not stand still until it is. */

const folder = makeFolder('log')
const files = await open(join(folder, 'any'), 'w')
const handles = Object.getPrototypeOf(files) as Pick<FileHandle, 'datasync'>
await files.close()

const { datasync } = handles

/** Holds up the disk: each attempt to write to it waits for its latch. */
function heldUp(test: Test) {
  const attempts: Latch<void>[] = []
  handles.datasync = async function (this: FileHandle) {
    const attempt = latch()
    attempts.push(attempt)
    await attempt.promise
    return datasync.call(this)
  }
  test.teardown(() => {
    handles.datasync = datasync
  })
  return attempts
}

const settled = async (promise: Promise<unknown>) => {
  const pending = Symbol('pending')
  return (await Promise.race([promise, new Promise((resolve) => setTimeout(resolve, 20, pending))])) !== pending
}

let names = 0
async function openLog(test: Test) {
  const path = join(folder, `log-${names++}`)
  await (await open(path, 'w')).close()
  const log = new Log(path)
  test.teardown(() => log.close())
  const write = () => {
    log.grown()
    return log.written()
  }
  return { log, write }
}

t.test('one wait is enough for all that was written before it began, and none is for what came later', async (t) => {
  const attempts = heldUp(t)
  const { log, write } = await openLog(t)
  const first = write()
  await until(() => attempts.length === 1)
  const joined = log.written()
  const later = [write(), write(), log.written()]
  attempts[0]?.open(undefined)
  await Promise.all([first, joined])
  await until(() => attempts.length === 2)
  t.equal(await settled(Promise.race(later)), false)
  attempts[1]?.open(undefined)
  await Promise.all(later)
  await log.written()
  t.equal(attempts.length, 2)
})

t.test('a disk that fails is an error of all who waited for it, and is tried again by who comes next', async (t) => {
  const { datasync } = handles
  t.teardown(() => {
    handles.datasync = datasync
  })
  const { log, write } = await openLog(t)
  handles.datasync = () => Promise.reject(new Error('the disk is broken'))
  const failed = [write(), write()]
  for (const each of failed) await t.rejects(each, { message: 'the disk is broken' })
  await t.rejects(log.written(), { message: 'the disk is broken' }, 'it is still not there')
  handles.datasync = datasync
  await log.written()
})

t.test('no claim, step or reply is acknowledged before it is on the disk', async (t) => {
  const stores = sqliteDrivers.map(([name, { open }]) => {
    const database = open(join(folder, name.replace(':', '-')))
    const store = new SqliteStore({ database, sweepInterval: null })
    t.teardown(() => store.close().then(() => database.close()))
    return store
  })
  const tokens = await Promise.all(stores.map((store) => take(store, 'a')))
  const attempts = heldUp(t)
  for (const [n, store] of stores.entries()) {
    const token = tokens[n] as string
    for (const ask of [
      () => store.acquire('b', claim()),
      () => store.step('a', token, ['ride', '1']),
      () => store.complete('a', token, reply(), null)
    ]) {
      const asked = ask()
      await until(() => attempts.length === 1, { message: 'the disk to be asked' })
      t.equal(await settled(asked), false)
      attempts.splice(0)[0]?.open(undefined)
      await asked
    }
    await store.get('a')
    t.equal(attempts.length, 0, 'nothing is asked of the disk for reading')
  }
})

t.test(
  'a reply that is on its way to the disk is shown to nobody before, and completing again does not say that it is there',
  async (t) => {
    for (const [name, { open }] of sqliteDrivers) {
      const database = open(join(folder, `shown-${name.replace(':', '-')}`))
      const store = new SqliteStore({ database, sweepInterval: null })
      t.teardown(() => store.close().then(() => database.close()))
      const token = await take(store, 'a')
      const attempts = heldUp(t)
      const completed = store.complete('a', token, reply(), null)
      await until(() => attempts.length === 1, { message: 'the disk to be asked' })
      const [found, again] = [store.acquire('a', claim()), store.complete('a', token, reply(), null)]
      t.equal(await settled(Promise.race([found, again])), false)
      attempts[0]?.fail(new Error('the disk is broken'))
      for (const each of [completed, found, again] as Promise<unknown>[])
        await t.rejects(each, { message: 'the disk is broken' })
      const third = store.complete('a', token, reply(), null)
      await until(() => attempts.length === 2, { message: 'the disk to be asked again' })
      attempts[1]?.open(undefined)
      t.equal(await third, true)
      handles.datasync = datasync
    }
  }
)
