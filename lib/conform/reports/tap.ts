import type { ConformReport, ReportedRule } from '../report.js'

/** TAP version 14. What may be missing is a TODO, what does not count is skipped. */
export function tapReport({ url, seed, countedBy, rules }: ConformReport): string {
  const lines = ['TAP version 14', `# ${url}, seed ${seed}, executions counted by ${countedBy}`]
  for (const [n, rule] of rules.entries()) lines.push(...ruleLines(rule, n + 1))
  lines.push(`1..${rules.length}`)
  return `${lines.join('\n')}\n`
}

function ruleLines({ id, level, title, source, outcome, reason, exchanges }: ReportedRule, number: number): string[] {
  const isOk = outcome !== 'failed'
  const name = `${isOk ? 'ok' : 'not ok'} ${number} - ${id} (${level}): ${escaped(title)}`
  if (outcome === 'passed') return [name]
  if (isOk) return [`${name} # SKIP ${outcome.replace('-', ' ')}: ${escaped(reason)}`]
  return [
    level === 'may' ? `${name} # TODO ${escaped(reason)}` : name,
    '  ---',
    `  reason: ${JSON.stringify(reason)}`,
    `  source: ${JSON.stringify(source)}`,
    // JSON is YAML.
    `  exchanges: ${JSON.stringify(exchanges)}`,
    '  ...'
  ]
}

function escaped(text: string): string {
  return text.replaceAll(/[\\#]/g, '\\$&').replaceAll(/\s+/g, ' ')
}
