import { type ConformReport, type ReportedRule, tally } from '../report.js'
import { LEVELS } from '../rules.js'

const STYLE = `body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{text-transform:uppercase;font-size:1rem;margin-top:2rem}li{margin:.6rem 0}ul{list-style:none;padding:0}
pre{background:#f4f4f4;padding:.6rem;overflow:auto;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
.outcome{display:inline-block;min-width:8rem;font-weight:600}.passed .outcome{color:#176b2c}.failed .outcome{color:#b3131b}
.declared .outcome{color:#8a5a00}small,.not-applicable,.not-decidable{color:#666}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}pre{background:#222}.passed .outcome{color:#6fd186}
.failed .outcome{color:#ff8a8a}.declared .outcome{color:#f0b95a}small,.not-applicable,.not-decidable{color:#999}}`

/** A page that needs nothing else. */
export function htmlReport(report: ConformReport): string {
  const levels = LEVELS.map((level) => {
    const rules = report.rules.filter((rule) => rule.level === level)
    return `<h2>${level}</h2>\n<ul>\n${rules.map(ruleItem).join('')}</ul>\n`
  })
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Idempotency keys at ${html(report.url)}</title>
<style>${STYLE}</style>
<h1>Idempotency keys at ${html(report.url)}</h1>
<p>${html(LEVELS.map((level) => tally(report, level)).join('; '))}.</p>
<p><small>${html(`${report.date}, seed ${report.seed}, ${report.requests} requests, executions counted by ${report.countedBy}`)}</small></p>
${levels.join('')}</html>
`
}

function ruleItem({ id, title, source, outcome, reason, exchanges }: ReportedRule): string {
  const parts = [
    `<li id="${id}" class="${outcome}"><span class="outcome">${outcome.replace('-', ' ')}</span> <code>${id}</code> ${html(title)}`
  ]
  if (reason !== '') parts.push(`<br>${html(reason)}`)
  if (outcome !== 'passed') parts.push(`<br><small>${html(source)}</small>`)
  if (exchanges.length > 0) {
    const texts = exchanges.map(
      ({ what, curl, reply, failure }) =>
        `# ${what}\n${curl}\n${reply === null ? failure : [`HTTP ${reply.status}`, ...reply.headers.map((line) => line.join(': ')), '', reply.body].join('\n')}`
    )
    parts.push(
      `<details><summary>What shows it</summary>${texts.map((text) => `<pre>${html(text)}</pre>`).join('')}</details>`
    )
  }
  return `${parts.join('')}</li>\n`
}

function html(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;')
}
