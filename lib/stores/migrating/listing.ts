import type { IdempotencyStore, ListedKind, ListedPage } from '../../../types/index.js'

/* What two stores have, page by page. */

type List = NonNullable<IdempotencyStore['list']>

/** The pages of `to`, then those of `from`. What both have is on pages of both, each time as that one has it. */
export async function listBoth(
  inFrom: List,
  inTo: List,
  kinds: readonly ListedKind[],
  cursor: string | null
): Promise<ListedPage> {
  const [side, after] = cursor === null ? (['to', null] as const) : parse(cursor)
  if (side === 'from') return page('from', await inFrom(kinds, after))
  const found = await inTo(kinds, after)
  return found.cursor === null ? { ...found, cursor: format('from', null) } : page('to', found)
}

type Side = 'from' | 'to'

function page(side: Side, found: ListedPage): ListedPage {
  return found.cursor === null ? found : { ...found, cursor: format(side, found.cursor) }
}

function format(side: Side, after: string | null): string {
  return JSON.stringify([side, after])
}

function parse(cursor: string): readonly [Side, string | null] {
  return JSON.parse(cursor)
}
