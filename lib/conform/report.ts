import type { Finding, Outcome, Shown } from './finding.js'
import { curl } from './http.js'
import type { Level, Rule } from './rule.js'

/* What a run has found. */

/** What a rule came to; `'declared'`: broken, and the profile says that this is deliberate. */
export type RuleOutcome = Outcome | 'declared'

/** An exchange that shows something. */
export interface ReportedExchange {
  /** Its part in what is shown, such as `'the retry'`. */
  readonly what: string
  /** A command line that sends the same request again. */
  readonly curl: string
  /** `null` where there was none. */
  readonly reply: {
    readonly status: number
    readonly headers: readonly (readonly [name: string, value: string])[]
    /** Its first 4,096 bytes, as UTF-8. */
    readonly body: string
  } | null
  /** Why there was no reply; `null` where there was one. */
  readonly failure: string | null
}

/** One rule, and what it came to. */
export interface ReportedRule {
  readonly id: string
  readonly level: Level
  /** The promise, as a sentence. */
  readonly title: string
  /** Where the promise is from. */
  readonly source: string
  readonly outcome: RuleOutcome
  /** Why; empty where there is nothing to say. */
  readonly reason: string
  readonly exchanges: readonly ReportedExchange[]
}

/** What a run has found. */
export interface ConformReport {
  readonly url: string
  /** When it began (RFC 3339). */
  readonly date: string
  /** With the same seed, and an endpoint that has forgotten it, everything is sent again as it was. */
  readonly seed: string
  /** How executions were counted. */
  readonly countedBy: string
  readonly requests: number
  readonly durationMs: number
  /** What the profile says and is not so, and limits that were reached: rules may not have been tried for that. */
  readonly problems: readonly string[]
  readonly rules: readonly ReportedRule[]
}

const SHOWN_BYTES = 4_096

export function reported(rule: Rule, finding: Finding, declared: string | undefined): ReportedRule {
  const { id, level, title, source } = rule
  const isDeclared = finding.outcome === 'failed' && declared !== undefined
  return {
    id,
    level,
    title,
    source,
    outcome: isDeclared ? 'declared' : finding.outcome,
    reason: isDeclared ? `${finding.reason}; declared: ${declared}` : finding.reason,
    exchanges: finding.shown.map(exchangeOf)
  }
}

function exchangeOf({ what, exchange: { request, reply, failure } }: Shown): ReportedExchange {
  return {
    what,
    curl: curl(request),
    reply: reply && {
      status: reply.status,
      headers: reply.headers,
      body: reply.body.subarray(0, SHOWN_BYTES).toString()
    },
    failure
  }
}

/** The rules of a level and an outcome. */
export function rulesOf(report: ConformReport, level: Level, ...outcomes: RuleOutcome[]): ReportedRule[] {
  return report.rules.filter((rule) => rule.level === level && outcomes.includes(rule.outcome))
}

/** In words, such as `must: 14 passed, 1 failed`; what did not happen is left out. */
export function tally(report: ConformReport, level: Level): string {
  const counts = (['passed', 'failed', 'declared', 'not-applicable', 'not-decidable'] as const)
    .map((outcome) => [rulesOf(report, level, outcome).length, outcome.replace('-', ' ')] as const)
    .filter(([count]) => count > 0)
  return `${level}: ${counts.map(([count, outcome]) => `${count} ${outcome}`).join(', ')}`
}
