import type { ListedKind, ListedOperation, ListOptions, PurgeOptions } from '../../types/index.js'
import { InvalidOption } from '../errors.js'
import { COUNT, checked, DURATION, oneOf, TEXT } from '../option-rules.js'
import { clock } from '../util/clock.js'
import type { KnownOperations } from './known-operations.js'

/* `app.idempotency.list` and `purge`: many operations at once. */

const KINDS: Record<NonNullable<ListOptions['state']>, readonly ListedKind[]> = {
  running: ['running'],
  abandoned: ['abandoned'],
  completed: ['reply', 'tombstone'],
  reply: ['reply'],
  tombstone: ['tombstone']
}
const ALL: readonly ListedKind[] = ['running', 'abandoned', 'reply', 'tombstone']
/** What is running is not forgotten: it would run again, beside itself. */
const AT_REST: readonly ListedKind[] = ['abandoned', 'reply', 'tombstone']
/** How many operations are forgotten at a time. */
const AT_ONCE = 16

const LIST_RULES = { state: oneOf(...Object.keys(KINDS)), route: TEXT, olderThan: DURATION, limit: COUNT }
const PURGE_RULES = { scope: TEXT, route: TEXT, olderThan: DURATION }

/** @throws FST_IDEMPOTENCY_INVALID_OPTION, before anything is listed */
export function list(known: KnownOperations, options: ListOptions): AsyncIterable<ListedOperation> {
  const { state, limit, ...wanted } = checked<ListOptions>(options, LIST_RULES, { owner: 'list() ' })
  return listAll(known, state === undefined ? ALL : KINDS[state], wanted, limit ?? Number.POSITIVE_INFINITY)
}

async function* listAll(
  known: KnownOperations,
  kinds: readonly ListedKind[],
  wanted: Wanted,
  limit: number
): AsyncGenerator<ListedOperation> {
  let left = limit
  for await (const [, { keys }] of known.pages(kinds)) {
    for (const found of keys) {
      const operation = known.listed(found)
      if (!isWanted(operation, wanted)) continue
      yield operation
      if (--left === 0) return
    }
  }
}

/** @throws FST_IDEMPOTENCY_INVALID_OPTION */
export async function purge(known: KnownOperations, options: PurgeOptions): Promise<number> {
  const given = options?.scope === undefined ? options : { ...options, scope: String(options.scope) }
  const { scope, ...wanted } = checked<PurgeOptions>(given ?? {}, PURGE_RULES, { owner: 'purge() ' })
  if (scope === undefined && wanted.route === undefined && wanted.olderThan === undefined) {
    throw new InvalidOption('purge() takes a scope, a route or an age: without any it would forget everything')
  }
  let count = 0
  for await (const [store, { keys }] of known.pages(AT_REST)) {
    const doomed = keys.filter(
      (found) => isWanted(known.listed(found), wanted) && (scope === undefined || known.isOf(found, scope))
    )
    for (let at = 0; at < doomed.length; at += AT_ONCE) {
      const gone = await Promise.all(doomed.slice(at, at + AT_ONCE).map(({ key }) => store.delete?.(key, true)))
      count += gone.filter(Boolean).length
    }
  }
  return count
}

interface Wanted {
  route?: string
  olderThan?: number
}

function isWanted(operation: ListedOperation, { route, olderThan }: Wanted): boolean {
  if (route !== undefined && operation.route !== route) return false
  return olderThan === undefined || clock.date() - (sinceOf(operation) ?? Number.POSITIVE_INFINITY) > olderThan
}

/** Since when an operation has been as it is. */
function sinceOf(operation: ListedOperation): number | undefined {
  switch (operation.state) {
    case 'running':
      return operation.startedAt
    case 'abandoned':
      return operation.ownerSeenAt
    case 'completed':
      return operation.createdAt
  }
}
