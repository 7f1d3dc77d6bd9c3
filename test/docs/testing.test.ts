import { readdirSync } from 'node:fs'
import t from 'tap'
import { nodeTest } from '../support/node-test.js'

/* The tests of docs/testing.md pass. */

t.test('every snippet of testing.md', async (t) => {
  const folder = new URL('snippets/', import.meta.url)
  const names = readdirSync(folder).filter((file) => /^testing-.*\.js$/.test(file))
  const others = names.filter((name) => !/-(?:app|setup)\.js$/.test(name))
  const { code, output } = await nodeTest(`
    const load = (name) => import(new URL(name, ${JSON.stringify(folder.href)}))
    const others = await Promise.all(${JSON.stringify(others)}.map(load))
    const { buildApp } = await (await load('testing-app.js')).run({})
    const given = await (await load('testing-setup.js')).run({ buildApp })
    // At once, as in one file.
    await Promise.all(others.map(({ run }) => run({ ...given, buildApp })))
  `)
  t.equal(code, 0, code === 0 ? 'it ends well' : output)
  t.equal(Number(/^# pass (\d+)$/m.exec(output)?.[1]), others.length + 1, 'one for each, and that of the setup')
  t.ok(others.length > 5)
})
