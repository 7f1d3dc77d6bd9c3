/** A number as a reader wants it: three digits at most. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–'
  if (value >= 100) return String(Math.round(value))
  if (value >= 10) return value.toFixed(1)
  return value.toFixed(2)
}

/** Median, and the quartiles behind it. */
export function ratioCell(value) {
  if (value === null || Number.isNaN(value.median)) return '–'
  return `${number(value.median)} (${number(value.low)}–${number(value.high)})`
}

/** Rows of cells in Markdown. */
export function table(head, rows) {
  const line = (cells) => `| ${cells.join(' | ')} |`
  return [line(head), line(head.map((_, i) => (i === 0 ? '---' : '---:'))), ...rows.map(line)].join('\n')
}
