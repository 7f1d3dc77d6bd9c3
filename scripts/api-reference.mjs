// Writes docs/api.md: every public declaration with its docstring, as the compiler emits them. `--check` only looks
// whether the page is up to date, and exits 1 when it is not. What is exported has to be in a section here, and what is
// in a section has to be exported.

import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join, posix } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

/**
 * @typedef {{ kind: string, name: string, doc: string, code: string, members: Member[] }} Declaration
 * @typedef {{ code: string, doc: string }} Member
 * @typedef {{ title: string, from: string, about?: string, names: string[] }} Section
 */

const root = fileURLToPath(new URL('..', import.meta.url))
const page = join(root, 'docs', 'api.md')

/** The emitted file behind each entry of the package. */
const ENTRIES = {
  'fastify-idempotency': 'index.d.ts',
  'fastify-idempotency/client': 'lib/client.d.ts',
  'fastify-idempotency/conform': 'lib/conform.d.ts',
  'fastify-idempotency/testing': 'lib/testing.d.ts',
  'fastify-idempotency/testkit': 'lib/testkit.d.ts',
  'fastify-idempotency/transactions': 'lib/transactions.d.ts'
}
const MAIN = 'fastify-idempotency'

/** @type {Section[]} */
const SECTIONS = [
  {
    title: 'The plugin',
    from: MAIN,
    about:
      'The default export, also as `idempotency`: `await app.register(idempotency, options)`. `require()` gives the same ' +
      'function, with everything else of this entry on it.',
    names: [
      'IdempotencyOptions',
      'IdempotencyRouteOptions',
      'IdempotencyRouteConfig',
      'ClaimHook',
      'KeyFormat',
      'Duration',
      'Secret'
    ]
  },
  {
    title: 'On requests and on the instance',
    from: MAIN,
    names: [
      'RequestIdempotency',
      'InstanceIdempotency',
      'OperationSelector',
      'OperationKey',
      'OperationOrigin',
      'OwnerSeen',
      'KnownOperation',
      'ListedOperation',
      'ListOptions',
      'PurgeOptions',
      'Outcome',
      'RunOptions',
      'RunContext'
    ]
  },
  {
    title: 'Steps',
    from: MAIN,
    names: ['Step', 'StepContext', 'Stored', 'Transactions', 'TransactionalStep', 'CommittedStep']
  },
  {
    title: 'Stores',
    from: MAIN,
    about: 'Each is an `IdempotencyStore`; below is what they have besides.',
    names: [
      'MemoryStore',
      'MemoryStoreOptions',
      'RedisStore',
      'RedisStoreOptions',
      'RedisClient',
      'PostgresStore',
      'PostgresStoreOptions',
      'PostgresPool',
      'MysqlStore',
      'MysqlStoreOptions',
      'Mysql2Pool',
      'SqliteStore',
      'SqliteStoreOptions',
      'SqliteConnection',
      'EncryptedStore',
      'EncryptedStoreOptions',
      'EncryptionKey',
      'LocalCache',
      'LocalCacheOptions',
      'MigratingStore'
    ]
  },
  {
    title: 'A store of your own',
    from: MAIN,
    names: [
      'IdempotencyStore',
      'Claim',
      'Acquisition',
      'StoredRecord',
      'StoredReply',
      'Tombstone',
      'TombstoneReason',
      'ListedKind',
      'ListedPage',
      'ListedKey',
      'Unfinished',
      'Finished',
      'Settlement',
      'RecordBase',
      'StoredHeader',
      'TransactionClaim',
      'TransactionAcquisition',
      'ClaimTransaction',
      'TransactionOutcome',
      'StoredStep',
      'TransactionClient'
    ]
  },
  { title: 'A fingerprint of your own', from: MAIN, names: ['payloadFingerprint'] },
  {
    title: 'Events',
    from: MAIN,
    names: ['idempotencyEvents', 'IdempotencyEventName', 'IdempotencyEvent', 'Difference', 'Loss']
  },
  { title: 'OpenAPI', from: MAIN, names: ['openapiTransform', 'OpenapiTransform', 'RouteDocumentation'] },
  {
    title: 'The client',
    from: 'fastify-idempotency/client',
    about: 'How to use it: [For clients](clients.md).',
    names: [
      'idempotentFetch',
      'IdempotentFetchOptions',
      'IdempotentFetch',
      'IdempotentRequestInit',
      'IdempotentResponse',
      'OperationInfo',
      'IdempotentFetchError'
    ]
  },
  {
    title: 'Transactions for steps',
    from: 'fastify-idempotency/transactions',
    about: 'How to use them: [Steps in your own transactions](transactions.md).',
    names: [
      'sqlTransactions',
      'SqlTransactionsOptions',
      'StepsTableOptions',
      'SqlTransactions',
      'pgTransactions',
      'PgPool',
      'PgClient',
      'mysqlTransactions',
      'MysqlPool',
      'MysqlConnection',
      'sqliteTransactions',
      'SqliteDatabase',
      'libsqlTransactions',
      'LibsqlClient',
      'LibsqlTransaction',
      'mongoTransactions',
      'MongoConnection',
      'MongoCollection',
      'MongoSession'
    ]
  },
  {
    title: 'For your own tests',
    from: 'fastify-idempotency/testing',
    about: 'How to use it: [Testing your routes](testing.md).',
    names: ['TestStore', 'TestClaim', 'TestRecord', 'TestReply', 'TestTombstone']
  },
  {
    title: 'The HTTP conformance suite',
    from: 'fastify-idempotency/conform',
    about: 'How to use it, and the command: [Does your API keep its promises?](conformance.md).',
    names: [
      'conform',
      'ConformOptions',
      'Profile',
      'KeyProfile',
      'Counter',
      'Variant',
      'Headers',
      'ConformReport',
      'ReportedRule',
      'RuleOutcome',
      'ReportedExchange',
      'Level',
      'written',
      'Reporter',
      'rules',
      'ConformError'
    ]
  },
  {
    title: 'The conformance kit',
    from: 'fastify-idempotency/testkit',
    names: [
      'storeConformance',
      'ConformanceOptions',
      'ConformanceCase',
      'ConformanceTopic',
      'StoreFactory',
      'StoreUnderTest'
    ]
  }
]

/** The plugin itself, which has no docstring of its own to show. */
const UNLISTED = ['idempotency', 'default', 'module.exports']

// In the project, where the errors find what they import.
mkdirSync(join(root, '.cache'), { recursive: true })
const built = mkdtempSync(join(root, '.cache', 'api-'))
process.on('exit', () => rmSync(built, { recursive: true, force: true }))

const compiler = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
const compiled = spawnSync(
  process.execPath,
  [compiler, '-p', join(root, 'tsconfig.build.json'), '--module', 'ESNext', '--outDir', built],
  {
    encoding: 'utf8'
  }
)
if (compiled.status !== 0) throw new Error(`tsc failed:\n${compiled.stdout}${compiled.stderr}`)

/** @type {Map<string, Declaration>} */
const known = new Map()
for (const [entry, file] of Object.entries(ENTRIES)) {
  const listed = SECTIONS.filter(({ from }) => from === entry).flatMap(({ names }) => names)
  const exported = exportsOf(file)
  const forgotten = [...exported.keys()].filter((name) => !listed.includes(name) && !UNLISTED.includes(name))
  const gone = listed.filter((name) => !exported.has(name))
  if (forgotten.length > 0) throw new Error(`${entry} exports what is in no section: ${forgotten.join(', ')}`)
  if (gone.length > 0) throw new Error(`${entry} does not export: ${gone.join(', ')}`)
  for (const name of listed) known.set(name, /** @type {Declaration} */ (exported.get(name)))
}

const text = await render()
if (!process.argv.includes('--check')) writeFileSync(page, text)
else if (readFileSync(page, 'utf8') !== text) {
  console.error('docs/api.md is not up to date: npm run api')
  process.exitCode = 1
}

/**
 * What a module exports, by name.
 * @param {string} file
 * @returns {Map<string, Declaration>}
 */
function exportsOf(file) {
  const found = new Map()
  const source = readFileSync(join(built, file), 'utf8')
  const other = (/** @type {string} */ path) =>
    exportsOf(posix.join(posix.dirname(file), path.replace(/\.js$/, '.d.ts')))
  const imported = new Map(
    [...source.matchAll(/^import (?:type )?\{ (.+) \} from '(\..+)';/gm)].flatMap(([, names = '', path = '']) =>
      names.split(', ').map((name) => [name, path])
    )
  )
  for (const { doc, code } of statements(source)) {
    const declaration = declarationOf(doc, code)
    if (declaration !== null) {
      if (code.startsWith('export ')) found.set(declaration.name, declaration)
      continue
    }
    const [, everything] = /^export type \* from '(\..+)'/.exec(code) ?? []
    if (everything !== undefined) for (const [name, its] of other(everything)) found.set(name, its)
    const [, names, path] = /^export (?:type )?\{ (.+) \}(?: from '(\..+)')?/.exec(code) ?? []
    for (const exported of names?.split(', ') ?? []) {
      const [local = '', as = local] = exported.split(' as ').map((name) => name.replaceAll("'", ''))
      const from = path ?? imported.get(local)
      found.set(as, from === undefined ? null : other(from).get(local))
    }
  }
  return found
}

/**
 * The statements of a module, or the members of an interface or class, each with the comment before it.
 * @param {string} source
 * @returns {Member[]}
 */
function statements(source) {
  const found = []
  const token = /\/\*[\s\S]*?\*\/|\/\/.*|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|`(?:[^`\\]|\\.)*`|[{}()[\];]/g
  let [depth, start, doc] = [0, 0, '']
  const end = (/** @type {number} */ at) => {
    const code = source.slice(start, at).trim()
    if (code !== '') found.push({ code, doc })
    if (code !== '') doc = ''
    start = at
  }
  for (const match of source.matchAll(token)) {
    const [it] = match
    const after = match.index + it.length
    if (it.startsWith('/')) {
      if (depth > 0 || source.slice(start, match.index).trim() !== '') continue
      // The last one counts: what says something to a tool only is a comment of its own.
      if (it.startsWith('/**') && !it.includes('@ts-')) doc = it
      start = after
    } else if ('{(['.includes(it)) depth++
    else if ('})]'.includes(it)) {
      depth--
      const block = /^(?:export )?(?:declare )?(?:abstract )?(?:interface|class|module|global)\b/
      if (depth === 0 && it === '}' && block.test(source.slice(start, after).trim())) end(after)
    } else if (it === ';' && depth === 0) end(after)
  }
  return found
}

/**
 * @param {string} doc
 * @param {string} code
 * @returns {Declaration | null}
 */
function declarationOf(doc, code) {
  const plain = code.replace(/^export /, '').replace(/^declare /, '')
  const [, kind, name] = /^(interface|class|type|function|const|module) '?([\w$]+)/.exec(plain) ?? []
  if (kind === undefined || name === undefined) return null
  const members =
    kind === 'interface' || kind === 'class' || kind === 'module'
      ? statements(plain.slice(plain.indexOf('{') + 1, plain.lastIndexOf('}')))
      : []
  return { kind, name, doc, code: plain, members }
}

/** The text of a docstring, its tags apart. @param {string} doc */
function parse(doc) {
  const lines = doc
    .replace(/^\/\*\*|\*\/$/g, '')
    .split('\n')
    .map((line) => line.replace(/^\s*\* ?/, '').trimEnd())
  const [prose = '', ...tags] = lines
    .join('\n')
    .trim()
    .split(/\n?^@(?=\w)/m)
  const tagged = tags.map((tag) => {
    const [, name = '', text = ''] = /^(\w+)\s*([\s\S]*)$/.exec(tag.trim()) ?? []
    return { name, text: text.replaceAll(/\s+/g, ' ') }
  })
  return { prose: prose.trim(), tagged }
}

/** What is said in a docstring, as Markdown. @param {string} doc */
function prose(doc) {
  const { prose, tagged } = parse(doc)
  const paragraphs = prose
    .split('\n\n')
    .map((paragraph) =>
      paragraph.startsWith('    ')
        ? `\`\`\`typescript\n${paragraph.replaceAll(/^ {4}/gm, '')}\n\`\`\``
        : linked(paragraph.replaceAll(/\s*\n\s*/g, ' '))
    )
  const tags = tagged.map(({ name, text }) => {
    if (name === 'default') return `Default: ${defaultOf(text)}.`
    if (name === 'param') return `\`${text.split(' ')[0]}\`: ${linked(text.slice(text.indexOf(' ') + 1))}`
    if (name === 'throws') return `Throws ${linked(text.replaceAll(/FST_\w+/g, errorLink))}`.replace(/([^.])$/, '$1.')
    if (name === 'returns') return `Returns ${linked(text)}`
    throw new Error(`the tag @${name} is not known here`)
  })
  return [...paragraphs, ...tags].filter((part) => part !== '')
}

/** A value is code; a rule in words is not. @param {string} text */
function defaultOf(text) {
  const value = /^('[^']*'|\[[^\]]*\]|new \w+\(\)|[\w.]+$)/.exec(text)?.[0]
  if (value === undefined) return text
  return `\`${value}\`${text.slice(value.length).replaceAll(/'\w+'/g, '`$&`')}`
}

/** @param {string} text */
function linked(text) {
  return text.replaceAll(/(?<!\[)`(\w+)`/g, (code, name) => (known.has(name) ? `[${code}](#${anchor(name)})` : code))
}

/** @param {string} name */
function anchor(name) {
  return name.toLowerCase()
}

/** @param {string} code */
function errorLink(code) {
  return `[\`${code}\`](errors.md#${anchor(code)})`
}

/** One line of code, without what only a compiler needs. @param {string} code */
function signature(code) {
  return code.replaceAll(/\s+/g, ' ').replace(/;$/, '')
}

/** @param {Member} member */
function item({ code, doc }) {
  const said = prose(doc)
  return `- \`${signature(code)}\`${said.length > 0 ? `<br>${said.join(' ')}` : ''}`
}

/** @param {string} name */
function entry(name) {
  const { kind, doc, code, members, name: declared } = /** @type {Declaration} */ (known.get(name))
  const lines = [`### ${name}`, '', ...prose(doc).flatMap((paragraph) => [paragraph, ''])]
  if (kind !== 'interface' && kind !== 'class') {
    const shown = code.replaceAll(/^ {4}/gm, '  ').replaceAll(/ +$/gm, '').replace(/;$/, '')
    return [...lines, '```typescript', shown, '```', ''].join('\n')
  }
  const heritage = code.slice(code.indexOf(declared) + declared.length, code.indexOf('{')).trim()
  const own = kind === 'class' ? members.filter(isShown) : members
  if (heritage !== '') lines.push(`\`${kind} ${declared} ${heritage}\``, '')
  lines.push(...own.map((member) => item(kind === 'class' ? constructed(declared, member) : member)))
  return `${lines.join('\n').trimEnd()}\n`
}

/** The methods that a class has because it is a store are described there. @param {Member} member */
function isShown({ code, doc }) {
  return !/^[#[]/.test(code) && (doc !== '' || code.startsWith('constructor') || /^readonly \w+: /.test(code))
}

/** @type {(name: string, member: Member) => Member} */
function constructed(name, { code, doc }) {
  return { code: code.replace(/^constructor/, `new ${name}`), doc }
}

/** What the plugin adds to Fastify's own types. */
function augmentations() {
  const source = readFileSync(join(built, 'types', 'index.d.ts'), 'utf8')
  const module = statements(source).find(({ code }) => code.startsWith('declare module'))
  const places = declarationOf('', module?.code ?? '')?.members ?? []
  const called = { FastifyContextConfig: 'config.', FastifyRequest: 'request.', FastifyInstance: 'app.' }
  const items = places.flatMap(({ code }) => {
    const { name, members } = /** @type {Declaration} */ (declarationOf('', code))
    const before = called[/** @type {keyof typeof called} */ (name)]
    if (before === undefined) throw new Error(`${name} is extended, and not known here`)
    return members.map(({ code, doc }) => item({ code: before + code, doc }))
  })
  return [...items, ''].join('\n')
}

async function errors() {
  const all = await import(pathToFileURL(join(built, 'lib', 'errors.js')).href)
  const rows = Object.values(all).flatMap((Type) => {
    const { code, statusCode } = new Type('')
    return code === undefined ? [] : [`| ${errorLink(code)} | ${statusCode} |`]
  })
  return ['| `code` | `statusCode` |', '|---|---|', ...rows, ''].join('\n')
}

async function render() {
  const parts = [
    '# API',
    '',
    'Every public declaration with what is said of it in the source, from which this page is made: `npm run api`. Durations are milliseconds, sizes are bytes.',
    ''
  ]
  for (const { title, from, about, names } of SECTIONS) {
    parts.push(`## ${title}`, '', `From \`${from}\`.${about === undefined ? '' : ` ${linked(about)}`}`, '')
    if (names.includes('RequestIdempotency')) parts.push(augmentations())
    parts.push(...names.map(entry))
  }
  parts.push(
    '## Errors',
    '',
    'Fastify errors, known by their `code`. [What each means, and what to do](errors.md).',
    '',
    await errors()
  )
  return `${parts.join('\n').trimEnd()}\n`
}
