// Makes the folder that is published: node scripts/release.mjs --repository https://github.com/<owner>/<name> [--out <folder>]
//
// package.json here names no repository: whoever publishes the package says where it is, here or by RELEASE_REPOSITORY, and
// nothing is made without it. In the folder, package.json names it (`repository`, `homepage`, `bugs`) and has no scripts, so
// that none runs beside a token or where the package is installed; the README, which npm shows by itself, has absolute links;
// other pages have them where they lead out of the package. npm draws no Mermaid, and chooses no source of a picture: its
// README has the drawing as text, and of a picture the image.

import { spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, extname, join, posix } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))

/**
 * The repository by its address, as people write it.
 * @param {string | undefined} address
 */
export function repositoryOf(address) {
  const [, name] = /^https:\/\/github\.com\/([\w.-]+\/[\w.-]+?)(?:\.git)?\/?$/.exec(address ?? '') ?? []
  if (name === undefined) {
    const got = address ? `not ${address}` : 'by --repository, or in RELEASE_REPOSITORY'
    throw new Error(`Where is the repository? https://github.com/<owner>/<name>, ${got}`)
  }
  return `https://github.com/${name}`
}

/**
 * package.json, as it is published.
 * @param {Record<string, unknown>} manifest
 * @param {string} repository
 */
export function publishedManifest({ scripts: _, devDependencies: __, overrides: ___, ...manifest }, repository) {
  return {
    ...manifest,
    repository: { type: 'git', url: `git+${repository}.git` },
    homepage: `${repository}#readme`,
    bugs: { url: `${repository}/issues` }
  }
}

/**
 * A page, as it is published.
 * @param {string} page its path
 * @param {string} text
 * @param {{ repository: string, tag: string, files: ReadonlySet<string> }} published `files` are those of the package
 */
export function publishedPage(page, text, { repository, tag, files }) {
  const isShownAlone = page === 'README.md'
  /** @type {(path: string) => string | undefined} */
  const absolute = (path) => {
    const target = posix.normalize(posix.join(posix.dirname(page), path))
    if (!isShownAlone && files.has(target)) return undefined
    const kind = /\.(?:png|svg)$/.test(target)
      ? 'raw'
      : extname(target) || posix.basename(target) === 'LICENSE'
        ? 'blob'
        : 'tree'
    return `${repository}/${kind}/${tag}/${target.replace(/\/$/, '')}`
  }
  return text
    .split(/^(```[\s\S]*?^```)/m)
    .map((part) => {
      if (part.startsWith('```mermaid')) return isShownAlone ? drawn(part) : part
      if (part.startsWith('```')) return part
      return part
        .replaceAll(/<picture>[\s\S]*?(<img [^>]*>)\s*<\/picture>/g, '$1')
        .replaceAll(/(\]\(|<img [^>]*?\bsrc=")(?!https?:|mailto:|#)([^)#\s"]+)/g, (link, start, path) => {
          const address = absolute(path)
          return address ? `${start}${address}` : link
        })
    })
    .join('')
}

/**
 * A sequence diagram of Mermaid as text: participants, messages and notes over all of them.
 * @param {string} block
 */
export function drawn(block) {
  const lines = block.split('\n').map((line) => line.trim())
  const names = lines.flatMap((line) => /^participant (\w+) as (.+)$/.exec(line)?.slice(1, 3).join('\n') ?? [])
  const ids = names.map((name) => name.split('\n')[0])
  const messages = lines.map((line) => /^(\w+)--?>>(\w+): (.+)$/.exec(line))
  // Between two neighbours there is room for whatever they say to each other.
  const gaps = ids.slice(1).map((_, n) => {
    const said = messages.filter(
      (it) => it && [ids.indexOf(it[1]), ids.indexOf(it[2])].sort().join() === `${n},${n + 1}`
    )
    return Math.max(12, ...said.map((it) => (it?.[3]?.length ?? 0) + 7))
  })
  const places = ids.map((_, n) => gaps.slice(0, n).reduce((sum, gap) => sum + gap, 3))
  const bars = () => {
    const row = new Array((places.at(-1) ?? 0) + 1).fill(' ')
    for (const place of places) row[place] = '|'
    return row
  }
  const put = (/** @type {string[]} */ row, /** @type {number} */ at, /** @type {string} */ text) => {
    row.splice(at, text.length, ...text)
    return row
  }
  const rows = [
    names.reduce((row, name, n) => put(row, (places[n] ?? 0) - 3, name.split('\n')[1] ?? ''), [...' '.repeat(200)])
  ]
  for (const [n, line] of lines.entries()) {
    const [, note] = /^Note over .+?: (.+)$/.exec(line) ?? []
    if (note !== undefined) rows.push(bars(), put(bars(), (places[0] ?? 0) + 2, ` ${note} `))
    const [, from = '', to = '', text = ''] = messages[n] ?? []
    if (text === '') continue
    const [start, end] = [places[ids.indexOf(from)] ?? 0, places[ids.indexOf(to)] ?? 0]
    const length = Math.abs(end - start) - 1
    const words = start < end ? `- ${text} `.padEnd(length - 1, '-').concat('>') : `<- ${text} `.padEnd(length, '-')
    rows.push(put(bars(), Math.min(start, end) + 1, words))
  }
  return `\`\`\`text\n${rows.map((row) => row.join('').trimEnd()).join('\n')}\n\`\`\``
}

/** The files of the package. @returns {string[]} */
export function packedFiles() {
  const args = ['pack', '--dry-run', '--json', '--ignore-scripts', '--loglevel=error']
  const { status, stdout, stderr } = spawnSync('npm', args, { cwd: root, encoding: 'utf8' })
  if (status !== 0) throw new Error(stderr)
  const [{ files }] = /** @type {[{ files: { path: string }[] }]} */ (JSON.parse(stdout))
  return files.map(({ path }) => path)
}

/** @param {string[]} args */
function release(args) {
  const option = (/** @type {string} */ name) => (args.includes(name) ? args[args.indexOf(name) + 1] : undefined)
  const repository = repositoryOf(option('--repository') ?? process.env.RELEASE_REPOSITORY)
  const out = option('--out') ?? join(root, '.cache', 'release')
  const files = packedFiles()
  if (!files.includes('dist/index.js')) throw new Error('Nothing is built: npm run build')
  const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  const published = { repository, tag: `v${manifest.version}`, files: new Set(files) }
  rmSync(out, { recursive: true, force: true })
  for (const file of files) {
    mkdirSync(dirname(join(out, file)), { recursive: true })
    if (file === 'package.json') {
      writeFileSync(join(out, file), `${JSON.stringify(publishedManifest(manifest, repository), null, 2)}\n`)
    } else if (/^[^/]+\.(?:md|txt)$|^docs\//.test(file)) {
      writeFileSync(join(out, file), publishedPage(file, readFileSync(join(root, file), 'utf8'), published))
    } else cpSync(join(root, file), join(out, file))
  }
  console.log(`${files.length} files, for ${repository}: npm publish ${out}`)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  try {
    if (process.argv.includes('--help')) {
      console.log(
        'npm run build && node scripts/release.mjs --repository https://github.com/<owner>/<name> [--out <folder>]'
      )
    } else if (process.argv.includes('--refuse')) {
      throw new Error('Publish the folder that `npm run release` makes, not this one')
    } else release(process.argv.slice(2))
  } catch (error) {
    console.error(error instanceof Error ? error.message : error)
    process.exitCode = 1
  }
}
