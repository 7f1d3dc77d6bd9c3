import type { ConformReport } from './conform/report.js'
import { REPORTERS, type Reporter } from './conform/reports.js'
import type { Level } from './conform/rule.js'
import { RULES } from './conform/rules.js'

export { ConformError } from './conform/baseline.js'
export type { Counter, Headers, KeyProfile, Profile, Variant } from './conform/profile.js'
export type { ConformReport, ReportedExchange, ReportedRule, RuleOutcome } from './conform/report.js'
export type { Reporter } from './conform/reports.js'
export type { Level } from './conform/rule.js'
export type { ConformOptions } from './conform/run.js'
export { conform } from './conform/run.js'

/** A report as a text: for a terminal, as TAP 14, as JUnit's XML, as JSON or as a page of HTML. */
export function written(report: ConformReport, reporter: Reporter): string {
  return REPORTERS[reporter](report)
}

/** All rules: what is tried, and where it is from. */
export const rules: readonly {
  readonly id: string
  readonly level: Level
  readonly title: string
  readonly source: string
}[] = RULES.map(({ id, level, title, source }) => ({ id, level, title, source }))
