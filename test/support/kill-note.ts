import { linkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

/** What a worker leaves in the folder of kills just before it kills itself, in a file named `<key>.<number>`. */
export interface KillNote {
  readonly key: string
  readonly point: string
  readonly worker: string
  /** By Date.now(). */
  readonly at: number
}

/** Kills this process, unless there have been so many kills for the key already. All in one go. */
export function killOnce(folder: string, kill: KillNote, kills: number): void {
  const note = join(folder, `.${kill.worker}`)
  writeFileSync(note, JSON.stringify(kill))
  for (let n = 1; n <= kills; n++) {
    try {
      // A link is there at once, with all that it says.
      linkSync(note, join(folder, `${kill.key}.${n}`))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EEXIST') continue
      throw error
    }
    process.kill(process.pid, 'SIGKILL')
  }
}
