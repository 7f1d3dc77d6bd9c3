import type { ConformReport } from './report.js'
import { htmlReport } from './reports/html.js'
import { junitReport } from './reports/junit.js'
import { tapReport } from './reports/tap.js'
import { textReport } from './reports/text.js'

/** A way to write a report. */
export type Reporter = 'text' | 'tap' | 'junit' | 'json' | 'html'

export const REPORTERS: Readonly<Record<Reporter, (report: ConformReport) => string>> = {
  text: textReport,
  tap: tapReport,
  junit: junitReport,
  json: (report) => `${JSON.stringify(report, null, 2)}\n`,
  html: htmlReport
}
