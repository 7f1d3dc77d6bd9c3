import type { Random } from './random.js'

/** Works on the items, so many at a time. */
export async function some<T>(items: readonly T[], width: number, work: (item: T) => Promise<void>): Promise<void> {
  const left = items.values()
  const lane = async () => {
    for (const item of left) await work(item)
  }
  await Promise.all(Array.from({ length: width }, lane))
}

export function shuffled<T>(items: readonly T[], random: Random): T[] {
  const ordered = items.map((item) => ({ item, order: random.next() })).sort((a, b) => a.order - b.order)
  return ordered.map(({ item }) => item)
}

export function countBy<T>(items: readonly T[], nameOf: (item: T) => string): Record<string, number> {
  const counts: Record<string, number> = {}
  for (const item of items) counts[nameOf(item)] = (counts[nameOf(item)] ?? 0) + 1
  return counts
}
