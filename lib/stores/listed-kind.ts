import type { Finished, ListedKind, Unfinished } from '../../types/index.js'

/** Which of what `list` can be asked for it is. */
export function kindOf(found: Unfinished | Finished): ListedKind {
  if (found.state !== 'completed') return found.state
  return typeof found.outcome === 'number' ? 'reply' : 'tombstone'
}
