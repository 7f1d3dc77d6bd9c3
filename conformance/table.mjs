// What results.json says, as tables of Markdown. Pure: a test compares them with the pages.

export const MARKERS = ['<!-- conformance: begin -->', '<!-- conformance: end -->']

const LEVELS = ['must', 'should', 'may']
const SIGNS = { passed: '✔', failed: '✘', declared: '◇', 'not-applicable': '–', 'not-decidable': '?' }

/**
 * For the README: peers in rows, how many rules of each level hold in columns.
 * @param {Results} results
 */
export function summary({ date, node, rules, peers }) {
  const rows = peers.map((peer) => [
    titleOf(peer, date),
    peer.on,
    ...LEVELS.map((level) => share(peer, rules, level)),
    broken(peer, rules)
  ])
  return [
    table(['', 'on', ...LEVELS, 'what does not hold of *must*'], rows, { left: ['what does not hold of *must*'] }),
    `\nRules that hold, of those that apply and can be decided. Each ${SIGNS.declared} is one that does not, as its documents say. ${dayOf(date)}, Node ${node}.`
  ].join('\n')
}

/**
 * For conformance/README.md: rules in rows, peers in columns, and what was found.
 * @param {Results} results
 */
export function details(results) {
  const { rules, peers } = results
  const blocks = [summary(results)]
  for (const level of LEVELS) {
    const rows = rules
      .filter((rule) => rule.level === level)
      .map(({ id, title }) => [
        `\`${id}\`: ${cell(title)}`,
        ...peers.map(({ outcomes }) => SIGNS[outcomes[id]?.outcome] ?? '')
      ])
    blocks.push(`\n### ${level}\n`, table([level, ...peers.map(({ name }) => name)], rows))
  }
  blocks.push(`\n${legend()}`)
  // Where nobody could be tried there is nothing to compare.
  const tried = rules.filter(({ id }) => peers.some(({ outcomes }) => outcomes[id]?.outcome !== 'not-decidable'))
  for (const peer of peers) blocks.push(...findings(peer, tried))
  return blocks.join('\n')
}

/** What a reader can look up of one peer. */
function findings(peer, rules) {
  const { package: name, version, on, built, date, seed, note, crashes, outcomes, error } = peer
  const lines = [
    `\n### ${peer.name}\n`,
    `[\`${name}\`](https://www.npmjs.com/package/${name}) ${version}, on ${on}; ${dayOf(date)}, seed \`${seed}\`.`
  ]
  if (built) lines.push(`Built from the tag of that version in its repository.`)
  if (note) lines.push(note)
  if (error) lines.push(`It could not be tried: ${cell(error)}`)
  if (crashes > 0)
    lines.push(
      `Its process ended ${crashes === 1 ? 'once' : `${crashes} times`} meanwhile; what did not pass was tried again, each rule on a new server.`
    )
  const told = rules.filter(({ id }) => ['failed', 'declared', 'not-decidable'].includes(outcomes[id]?.outcome))
  if (told.length > 0) lines.push('')
  for (const { id, level } of told) {
    const { outcome, reason } = outcomes[id]
    lines.push(`- ${SIGNS[outcome]} \`${id}\` (${level}): ${cell(reason)}`)
  }
  return lines
}

function legend() {
  return `${SIGNS.passed} holds · ${SIGNS.failed} does not · ${SIGNS.declared} does not, and its documents say so · ${SIGNS['not-applicable']} does not apply · ${SIGNS['not-decidable']} could not be decided`
}

function titleOf({ package: name, version, date }, newest) {
  const tried = dayOf(date) === dayOf(newest) ? '' : `, tried on ${dayOf(date)}`
  return `[${name}](https://www.npmjs.com/package/${name}) ${version}${tried}`
}

function broken({ outcomes, crashes }, rules) {
  const found = rules.filter(({ id, level }) => level === 'must' && outcomes[id]?.outcome === 'failed')
  return [...found.map(({ id }) => `\`${id}\``), ...(crashes > 0 ? ['its process ended'] : [])].join(', ')
}

function share({ outcomes }, rules, level) {
  const found = rules.filter((rule) => rule.level === level).map(({ id }) => outcomes[id]?.outcome)
  const count = (...wanted) => found.filter((outcome) => wanted.includes(outcome)).length
  const of = count('passed', 'failed', 'declared')
  if (of === 0) return 'not tried'
  const declared = count('declared')
  return `${count('passed')} of ${of}${declared > 0 ? ` ${SIGNS.declared.repeat(declared)}` : ''}`
}

/** The first column, and those in `left`, hold text. @param {string[]} head @param {string[][]} rows */
export function table(head, rows, { left = [] } = {}) {
  const line = (cells) => `| ${cells.join(' | ')} |`
  const marks = head.map((name, n) => (n === 0 || left.includes(name) ? '---' : ':---:'))
  return [line(head), line(marks), ...rows.map(line)].join('\n')
}

/** A text that stays in its cell, and is text. */
function cell(text) {
  return text
    .replaceAll(/[^\P{C}]+|\ufffd+/gu, ' ')
    .replaceAll(/[\\`*_[\]<>|#]/g, (sign) => `\\${sign}`)
    .trim()
}

function dayOf(date) {
  return new Date(date).toLocaleDateString('en-GB', { day: 'numeric', month: 'long', year: 'numeric', timeZone: 'UTC' })
}

/** A page with another text between the markers. */
export function withTable(page, text) {
  const [begin, end] = MARKERS.map((marker) => page.indexOf(marker))
  if (begin < 0 || end < begin) throw new Error('The page has no markers')
  return `${page.slice(0, begin + MARKERS[0].length)}\n\n${text}\n\n${page.slice(end)}`
}

/** What is between the markers. */
export function tableIn(page) {
  const [begin, end] = MARKERS.map((marker) => page.indexOf(marker))
  return page.slice(begin + MARKERS[0].length, end).trim()
}

/**
 * @typedef {object} Results results.json
 * @property {string} date
 * @property {string} node
 * @property {{ id: string, level: 'must' | 'should' | 'may', title: string }[]} rules
 * @property {Peer[]} peers
 *
 * @typedef {object} Peer
 * @property {string} name
 * @property {string} package
 * @property {string} version
 * @property {string} on
 * @property {string} date
 * @property {boolean} [built] From the sources of that version, not from npm.
 * @property {string} seed
 * @property {number} crashes
 * @property {string} [note]
 * @property {string} [error]
 * @property {Record<string, { outcome: keyof typeof SIGNS, reason?: string }>} outcomes
 */
