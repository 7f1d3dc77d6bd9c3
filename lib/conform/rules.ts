import type { Level, Rule } from './rule.js'
import { CALLERS } from './rules/callers.js'
import { KEYS } from './rules/keys.js'
import { ONCE } from './rules/once.js'
import { PAYLOADS } from './rules/payloads.js'
import { PUBLISHED } from './rules/published.js'
import { REPLIES } from './rules/replies.js'
import { RUNNING } from './rules/running.js'

export const LEVELS: readonly Level[] = ['must', 'should', 'may']

/** All rules, the weightiest first. */
export const RULES: readonly Rule[] = LEVELS.flatMap((level) =>
  [...ONCE, ...REPLIES, ...PAYLOADS, ...CALLERS, ...KEYS, ...RUNNING, ...PUBLISHED].filter(
    (rule) => rule.level === level
  )
)
