import { type ConformReport, type ReportedRule, rulesOf, tally } from '../report.js'
import type { Level } from '../rule.js'
import { LEVELS } from '../rules.js'

const MARKS: Record<ReportedRule['outcome'], string> = {
  passed: '✓',
  failed: '✗',
  declared: '!',
  'not-applicable': '-',
  'not-decidable': '?'
}

/** For a terminal. */
export function textReport(report: ConformReport): string {
  const lines = [
    report.url,
    `seed ${report.seed}, ${report.requests} requests, executions counted by ${report.countedBy}`
  ]
  for (const level of LEVELS) {
    const rules = report.rules.filter((rule) => rule.level === level)
    if (rules.length > 0) lines.push('', level.toUpperCase(), ...rules.flatMap(ruleLines))
  }
  const tried = LEVELS.filter((level) => report.rules.some((rule) => rule.level === level))
  lines.push('', ...tried.map((level) => tally(report, level)))
  const failed = (...levels: Level[]) => levels.flatMap((level) => rulesOf(report, level, 'failed').map(({ id }) => id))
  const [failures, services] = [failed('must', 'should'), failed('may')]
  if (failures.length > 0) lines.push('', `Failed: ${failures.join(', ')}`)
  if (services.length > 0) lines.push('', `Not offered: ${services.join(', ')}`)
  if (failures.length + services.length > 0)
    lines.push('The server knows the keys of these command lines now: put new ones in.')
  if (report.problems.length > 0) lines.push('', ...report.problems.map((problem) => `Problem: ${problem}`))
  return `${lines.join('\n')}\n`
}

function ruleLines({ id, title, source, outcome, reason, exchanges }: ReportedRule): string[] {
  const lines = [`  ${MARKS[outcome]} ${id}: ${title}`]
  if (outcome === 'passed') return reason === '' ? lines : [`${lines[0]} (${reason})`]
  lines.push(`      ${outcome.replace('-', ' ')}: ${reason}`)
  if (outcome !== 'failed' && outcome !== 'declared') return lines
  lines.push(`      source: ${source}`)
  for (const { what, curl, reply, failure } of exchanges) {
    const answer = reply === null ? failure : `${reply.status} ${reply.body.slice(0, 200).replaceAll(/\s+/g, ' ')}`
    lines.push(`      # ${what}`, `      ${curl}`, `      → ${answer}`)
  }
  return lines
}
