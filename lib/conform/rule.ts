import type { Finding } from './finding.js'
import type { Session } from './session.js'

/**
 * How much depends on a rule.
 * - `'must'`: where it is broken, something is carried out twice, or somebody gets what is not theirs.
 * - `'should'`: clients that were written for other servers need it.
 * - `'may'`: a service to clients.
 */
export type Level = 'must' | 'should' | 'may'

/** One promise of an endpoint that takes idempotency keys. */
export interface Rule {
  readonly id: string
  readonly level: Level
  /** The promise, as a sentence. */
  readonly title: string
  /** Where it is from: sections of documents, or who does so. */
  readonly source: string
  check(session: Session): Promise<Finding>
}

/** A section of the IETF draft. */
export const DRAFT = (section: string) => `draft-ietf-httpapi-idempotency-key-header §${section}`
export const DRAFT_SECURITY = 'draft-ietf-httpapi-idempotency-key-header, Security Considerations'
