import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** Runs a module under `node --test`, and returns how that ended and what it printed, as TAP. */
export async function nodeTest(source: string): Promise<{ code: number; output: string }> {
  const folder = await mkdtemp(join(tmpdir(), 'node-test-'))
  try {
    const file = join(folder, 'kit.test.mjs')
    await writeFile(file, source)
    // What tap loads into its own processes has no business there.
    const { NODE_OPTIONS: _, ...env } = process.env
    const args = ['--test', '--test-reporter=tap', file]
    return await new Promise((resolve) => {
      execFile(process.execPath, args, { env, maxBuffer: 1 << 26 }, (error, stdout, stderr) => {
        resolve({ code: error === null ? 0 : Number(error.code), output: stdout + stderr })
      })
    })
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}
