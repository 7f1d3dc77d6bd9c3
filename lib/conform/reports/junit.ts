import type { ConformReport, ReportedRule } from '../report.js'
import { LEVELS } from '../rules.js'

/** JUnit's XML, a suite for each level. What may be missing, and what does not count, is skipped. */
export function junitReport({ url, date, durationMs, rules }: ConformReport): string {
  const suites = LEVELS.map((level) => {
    const cases = rules.filter((rule) => rule.level === level)
    const failures = cases.filter(isFailure).length
    const skipped = cases.filter((rule) => rule.outcome !== 'passed' && !isFailure(rule)).length
    const attributes = `name="${level}" tests="${cases.length}" failures="${failures}" skipped="${skipped}" timestamp="${date}"`
    return `  <testsuite ${attributes}>\n${cases.map(caseOf).join('')}  </testsuite>\n`
  })
  const time = (durationMs / 1000).toFixed(3)
  return `<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="${xml(url)}" time="${time}">\n${suites.join('')}</testsuites>\n`
}

function isFailure({ outcome, level }: ReportedRule): boolean {
  return outcome === 'failed' && level !== 'may'
}

function caseOf(rule: ReportedRule): string {
  const { id, level, title, outcome, reason } = rule
  const open = `    <testcase classname="${level}" name="${xml(`${id}: ${title}`)}"`
  if (outcome === 'passed') return `${open}/>\n`
  if (!isFailure(rule)) {
    const why = outcome === 'failed' ? reason : `${outcome.replace('-', ' ')}: ${reason}`
    return `${open}><skipped message="${xml(why)}"/></testcase>\n`
  }
  return `${open}><failure message="${xml(reason)}">${xml(details(rule))}</failure></testcase>\n`
}

function details({ source, exchanges }: ReportedRule): string {
  const lines = [source]
  for (const { what, curl, reply, failure } of exchanges) {
    lines.push(`# ${what}`, curl, reply === null ? (failure as string) : `${reply.status} ${reply.body}`)
  }
  return lines.join('\n')
}

/** What XML 1.0 cannot have is left out. */
function xml(text: string): string {
  return text
    .replaceAll(/[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD]/g, '')
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;')
}
