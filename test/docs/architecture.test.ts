import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

/* The page on the architecture is true: what it names is there, and what it says of imports holds. */

const root = fileURLToPath(new URL('../../../', import.meta.url))
const page = readFileSync(join(root, 'docs/architecture.md'), 'utf8')

const files = (folder: string): string[] =>
  readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = `${folder}/${entry.name}`
    return entry.isDirectory() ? files(path) : path.endsWith('.ts') ? [path] : []
  })

const sources = files('lib')

/** What a file imports of lib/, types included. */
const importsOf = (file: string): string[] =>
  [...readFileSync(join(root, file), 'utf8').matchAll(/\bfrom '(\.[^']+)\.js'/g)]
    .map(([, path]) => `${normalize(join(dirname(file), path as string))}.ts`)
    .filter((path) => path.startsWith('lib/'))

t.test('every file and folder that is named exists', async (t) => {
  const named = [...page.matchAll(/`((?:lib|test|types)\/[\w/.-]*)`/g)].map(([, path]) => path as string)
  t.ok(named.length > 50)
  for (const path of named) t.ok(existsSync(join(root, path)), path)
  // In the picture they are named by their folder.
  const drawn = [...page.matchAll(/(?<![\w.])([\w-]+\.ts)\b/g)].map(([, name]) => name as string)
  for (const name of drawn)
    t.ok(
      sources.concat('types/store.ts', ...files('test')).some((file) => file.endsWith(`/${name}`)),
      name
    )
})

t.test('every folder of lib/ is described', async (t) => {
  for (const folder of new Set(sources.map(dirname)))
    t.ok(page.includes(folder.split('/').slice(0, 2).join('/')), folder)
})

t.test('what a file is said to hold, in brackets behind it, is in it', async (t) => {
  const held = [...page.matchAll(/`(lib\/[\w/.-]+\.ts)` \(`(#?\w+)`/g)]
  t.ok(held.length > 5)
  for (const [, file, name] of held) {
    t.ok(readFileSync(join(root, file as string), 'utf8').includes(name as string), `${file}: ${name}`)
  }
})

t.test('no file of lib/ imports itself by way of others', async (t) => {
  const done = new Set<string>()
  const visit = (file: string, way: string[]) => {
    if (way.includes(file)) t.fail([...way.slice(way.indexOf(file)), file].join(' -> '))
    if (done.has(file) || way.includes(file)) return
    for (const next of importsOf(file)) visit(next, [...way, file])
    done.add(file)
  }
  for (const file of sources) visit(file, [])
  t.equal(done.size, sources.length)
})

t.test('calls go one way: from http to operation, from there to the interface of stores', async (t) => {
  const allowed: Record<string, RegExp> = {
    'lib/operation': /^lib\/(?:operation|util|errors|events|options|stores\/(?:record-codec|attempts|steps))/,
    'lib/stores': /^lib\/(?:stores|util|errors|option-rules|warnings)/,
    'lib/transactions': /^lib\/(?:transactions|selected-key|util|errors|option-rules)/,
    'lib/util': /^lib\/(?:util|errors)/,
    'lib/testing': /^lib\/(?:testing|stores|operation|selected-key|util)/,
    'lib/testkit': /^lib\/testkit/
  }
  for (const [folder, pattern] of Object.entries(allowed)) {
    for (const file of sources.filter((source) => source.startsWith(`${folder}/`))) {
      for (const imported of importsOf(file)) t.match(imported, pattern, file)
    }
  }
})
