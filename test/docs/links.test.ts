import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

/* Links of all pages lead somewhere, here and in the package. */

const root = fileURLToPath(new URL('../../../', import.meta.url))
const text = (file: string) => readFileSync(join(root, file), 'utf8')
const inFolder = (folder: string) =>
  readdirSync(join(root, folder))
    .filter((file) => /\.(?:md|txt)$/.test(file))
    .map((file) => normalize(join(folder, file)))
const pages = ['.', 'docs', 'test', 'conformance', 'bench', 'examples'].flatMap(inFolder)

/** Without code, in which brackets are no links. */
const prose = (page: string) => text(page).replaceAll(/^```[\s\S]*?^```/gm, '')

/** The names that GitHub gives to the headings of a page. */
function anchorsOf(page: string): Set<string> {
  const anchors = new Set<string>()
  for (const [, heading = ''] of prose(page).matchAll(/^#+ (.+)$/gm)) {
    const shown = heading.replaceAll(/\[([^\]]*)\]\([^)]*\)/g, '$1')
    const name = shown
      .toLowerCase()
      .replaceAll(/[^\w\- ]/g, '')
      .replaceAll(' ', '-')
    let unique = name
    for (let n = 1; anchors.has(unique); n++) unique = `${name}-${n}`
    anchors.add(unique)
  }
  return anchors
}

/** Where the relative links and pictures of a page lead: a path from the root, and an anchor. */
function linksOf(page: string): { link: string; target: string; anchor: string | undefined }[] {
  const text = prose(page)
  const links = [...text.matchAll(/\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)/g)]
  const pictures = [...text.matchAll(/\bsrc(?:set)?="(?!https?:)([^"]*)"/g)]
  return [...links, ...pictures].map(([link, path, anchor]) => ({
    link,
    target: path ? normalize(join(dirname(page), path)) : page,
    anchor
  }))
}

t.test('relative links lead to files that are there, and anchors to headings', async (t) => {
  let count = 0
  for (const page of pages) {
    for (const { link, target, anchor } of linksOf(page)) {
      count++
      if (!existsSync(join(root, target))) t.fail(`${page}: ${link}`)
      else if (anchor !== undefined && !anchorsOf(target).has(anchor))
        t.fail(`${page}: ${link}, there is no such heading`)
    }
  }
  t.ok(count > 200)
})

t.test('no page is left out of the two lists', async (t) => {
  for (const list of ['README.md', 'docs/README.md']) {
    const linked = new Set(linksOf(list).map(({ target }) => target))
    for (const page of inFolder('docs')) t.ok(linked.has(page) || page === list, `${list}: ${page}`)
  }
})

t.test('each page of docs/ begins with the question that it answers', async (t) => {
  const index = text('docs/README.md')
  for (const page of inFolder('docs').filter((file) => !/api\.md$/.test(file))) {
    const [title = ''] = text(page).split('\n')
    t.match(title, /^# .*\?$/, page)
    if (page !== 'docs/README.md') t.ok(index.includes(title.slice('# '.length)), `docs/README.md: ${page}`)
  }
})

t.test('the README is no longer than one can read', async (t) => {
  t.ok(text('README.md').split('\n').length <= 420)
})

// GitHub shows so many columns in a window of 1280; what is generated, and what a machine draws, is another matter.
t.test('no line of code is cut off', async (t) => {
  const isWritten = (page: string) =>
    /^(?:README|conformance\/README|docs\/.*)\.md$/.test(page) && page !== 'docs/api.md'
  for (const page of pages.filter(isWritten)) {
    for (const [block = ''] of text(page).matchAll(/^```[\s\S]*?^```/gm)) {
      if (block.startsWith('```mermaid')) continue
      for (const line of block.split('\n')) if (line.length > 98) t.fail(`${page}: ${line}`)
    }
  }
})

interface Release {
  repositoryOf(address: string | undefined): string
  publishedManifest(manifest: object, repository: string): Record<string, unknown>
  publishedPage(page: string, text: string, published: object): string
  packedFiles(): string[]
}

const release = (await import(new URL('../../../scripts/release.mjs', import.meta.url).href)) as Release
const repository = 'https://github.com/example/shop'

t.test('whoever publishes says where the repository is', async (t) => {
  for (const address of [repository, `${repository}/`, `${repository}.git`])
    t.equal(release.repositoryOf(address), repository)
  for (const address of [undefined, '', 'example/shop', 'http://github.com/example/shop', 'https://github.com/example'])
    t.throws(() => release.repositoryOf(address), /Where is the repository\?/)
  const manifest = JSON.parse(text('package.json')) as Record<string, unknown>
  for (const name of ['repository', 'homepage', 'bugs']) t.notOk(name in manifest, `${name} comes from one place`)
  t.match(release.publishedManifest(manifest, repository), {
    name: 'fastify-idempotency',
    repository: { type: 'git', url: 'git+https://github.com/example/shop.git' },
    homepage: 'https://github.com/example/shop#readme',
    bugs: { url: 'https://github.com/example/shop/issues' },
    scripts: undefined
  })
})

t.test('what is published has no link that leads nowhere', async (t) => {
  const files = new Set(release.packedFiles())
  for (const page of inFolder('docs')) t.ok(files.has(page), `the package has ${page}`)
  let absolute = 0
  for (const page of pages.filter((file) => files.has(file))) {
    const published = release.publishedPage(page, text(page), { repository, tag: 'v1.0.0', files })
    const shown = published.replaceAll(/^```[\s\S]*?^```/gm, '')
    const links = [...shown.matchAll(/(?:\]\(|\bsrc(?:set)?=")([^)#\s"]+)/g)].map(([, link = '']) => link)
    for (const link of links) {
      if (link.startsWith('https:') || link.startsWith('http:')) {
        const [, path] = /^https:\/\/github\.com\/example\/shop\/(?:blob|tree|raw)\/v1\.0\.0\/(.*)$/.exec(link) ?? []
        if (path === undefined) continue
        absolute++
        if (!existsSync(join(root, path))) t.fail(`${page}: ${link}`)
      } else if (page === 'README.md') t.fail(`npm shows the README by itself: ${link}`)
      else if (!files.has(normalize(join(dirname(page), link)))) t.fail(`${page}: ${link} is not in the package`)
    }
  }
  t.ok(absolute > 50)
})

t.test('of a picture with sources npm is given the image, by its address', async (t) => {
  const page = `<picture>
  <source media="(prefers-color-scheme: dark)" srcset="docs/images/dark.png">
  <img alt="Two shops" src="docs/images/light.png">
</picture>

![one](docs/images/one.png) [page](docs/page.md#part) [here](#here)

<picture><source srcset="a.png"><img src="https://example.com/b.png"></picture>`
  const published = { repository, tag: 'v1.0.0', files: new Set() }
  t.equal(
    release.publishedPage('README.md', page, published),
    `<img alt="Two shops" src="${repository}/raw/v1.0.0/docs/images/light.png">

![one](${repository}/raw/v1.0.0/docs/images/one.png) [page](${repository}/blob/v1.0.0/docs/page.md#part) [here](#here)

<img src="https://example.com/b.png">`
  )
  t.match(text('README.md'), /<picture>/)
})

t.test('headings leave no level out', async (t) => {
  for (const page of pages.filter((page) => page.endsWith('.md'))) {
    let last = 0
    for (const [, signs = '', heading] of prose(page).matchAll(/^(#+) (.+)$/gm)) {
      if (signs.length > last + 1) t.fail(`${page}: ${heading}`)
      last = signs.length
    }
  }
})

t.test('where no diagrams are drawn, the README has it as text', async (t) => {
  const published = release.publishedPage('README.md', text('README.md'), {
    repository,
    tag: 'v1.0.0',
    files: new Set()
  })
  t.notMatch(published, /```mermaid/)
  const [diagram = ''] = /```mermaid[\s\S]*?```/.exec(text('README.md')) ?? []
  t.notMatch(diagram, /;/, 'to Mermaid it is the end of a line')
  t.match(published, /^client +plugin +store +handler$/m)
  const [, drawing = ''] = /```text\n(client[\s\S]*?)\n```/.exec(published) ?? []
  const widths = new Set(
    drawing
      .split('\n')
      .slice(1)
      .map((line) => line.length)
  )
  t.equal(widths.size, 1, 'no label is longer than its arrow')
})
