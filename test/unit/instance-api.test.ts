import t from 'tap'
import { type IdempotencyOptions, type IdempotencyStore, MemoryStore } from '../../index.js'
import { InstanceApi } from '../../lib/instance-api.js'
import { storageKey } from '../../lib/operation/storage-key.js'
import { registrationOptions } from '../../lib/options.js'
import { Registration } from '../../lib/registration.js'

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/
/** `run` is tried on a server. */
const apiOf = (options: IdempotencyOptions) =>
  new InstanceApi(new Registration(registrationOptions(options)), null as never, null as never)
const claim = { token: 't', fingerprint: 'f', leaseMs: 1_000, retainMs: 1_000, takeover: false }

t.test('generateKey makes a new UUID each time', async (t) => {
  const api = apiOf({ store: new MemoryStore() })
  t.match(api.generateKey(), UUID)
  t.not(api.generateKey(), api.generateKey())
})

t.test('hiddenInput is a form field with a new key, whose name is text', async (t) => {
  const input = (field: string) => apiOf({ store: new MemoryStore(), field }).hiddenInput()
  const [, name, key] = /^<input type="hidden" name="([^"]*)" value="([^"]*)">$/.exec(input('_key')) ?? []
  t.equal(name, '_key')
  t.match(key, UUID)
  t.match(input('a"b&c<d>&"'), 'name="a&quot;b&amp;c&lt;d&gt;&amp;&quot;"')
})

t.test('hiddenInput needs a field', async (t) => {
  const api = apiOf({ store: new MemoryStore() })
  t.throws(() => api.hiddenInput(), { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"field"/ })
})

t.test('get and delete find an operation by its key and scope', async (t) => {
  const store = new MemoryStore()
  const api = apiOf({ store })
  for (const scope of [null, '7']) {
    await store.acquire(storageKey(scope, 'k'), claim)
    const selector = scope === null ? undefined : { scope: 7 as unknown as string }
    t.match(await api.get('k', selector), { state: 'running', fingerprint: 'f' })
    t.equal(await api.delete('k', selector), true)
    t.equal(await api.get('k', selector), null)
    t.equal(await api.delete('k', selector), false)
  }
})

t.test('a key may be as it was in the header, or as it is', async (t) => {
  const store = new MemoryStore()
  const api = apiOf({ store })
  const long = 'l'.repeat(100_000)
  for (const [key, inHeader] of [
    ['k', '"k"'],
    ['k', '"k";a=1'],
    ['a"b', '"a\\"b"'],
    [long, `"${long}"`],
    ['not a key"', 'not a key"'],
    ['"', '"'],
    ['', '']
  ] as const) {
    await store.acquire(storageKey(null, key), claim)
    t.match(await api.get(inHeader), { state: 'running' }, inHeader.slice(0, 20))
    t.equal(await api.delete(inHeader), true)
  }
})

t.test('a store that cannot look up or delete is told by name', async (t) => {
  const { acquire, renew, complete, release } = new MemoryStore()
  const store: IdempotencyStore = { acquire, renew, complete, release }
  const api = apiOf({ store })
  t.equal(api.store, store)
  await t.rejects(api.get('k'), { message: 'This idempotency store has no get()' })
  await t.rejects(api.delete('k'), { message: 'This idempotency store has no delete()' })
})
