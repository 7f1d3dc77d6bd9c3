import { setImmediate as turn } from 'node:timers/promises'

/** The texts of the process warnings with this code that are given meanwhile. */
export async function warningsOf(code: string, work: () => unknown): Promise<string[]> {
  // Node gives a warning in the next tick: first those of before.
  await turn()
  const told: string[] = []
  const listen = (warning: Error & { code?: string }) => {
    if (warning.code === code) told.push(warning.message)
  }
  process.on('warning', listen)
  try {
    await work()
    await turn()
  } finally {
    process.off('warning', listen)
  }
  return told
}
