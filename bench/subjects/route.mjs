// What every subject serves, whatever framework it runs on: the same handlers and the same bytes.

/** JSON of roughly this many bytes: an object with rows, as APIs send them. */
export function jsonOf(bytes) {
  const value = { id: 'ch_3Nf8fK2eZvKYlo2C', status: 'succeeded', amount: 4200, currency: 'eur', rows: [] }
  const row = { name: 'a row of the body', price: 1999, tags: ['first', 'second'], note: 'x'.repeat(40) }
  while (JSON.stringify(value).length + JSON.stringify(row).length < bytes) value.rows.push(row)
  value.pad = ''
  value.pad = 'p'.repeat(Math.max(0, bytes - JSON.stringify(value).length))
  return value
}

/** One business route: counts its runs, and waits at its gate while there is one. */
export class Route {
  runs = 0
  /** A promise at which the handler waits, or nothing. */
  gate = null
  reply = jsonOf(500)

  handle = async () => {
    this.runs++
    if (this.gate !== null) await this.gate
    return this.reply
  }
}

export const COVERED = '/covered'
export const UNCOVERED = '/uncovered'
export const WAITING = '/waiting'
