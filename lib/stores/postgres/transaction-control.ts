/* Which statements of a text would begin or end a transaction. */

/** Statements that would begin or end a transaction; most have none of these words, and are not looked at closely. */
const SUSPECT = /\b(?:begin|start|commit|end|abort|rollback|prepare)\b/i
/**
 * The tokens that matter: names, because they may hold dollars; and what may hold such a word without meaning it. Of
 * dollar quotes and block comments it is the beginning only.
 */
const TOKEN =
  /[eE]'[^'\\]*(?:(?:\\[\s\S]|'')[^'\\]*)*'|([A-Za-z_\x80-\uffff][\w$\x80-\uffff]*)|'[^']*(?:''[^']*)*'|"[^"]*(?:""[^"]*)*"|\$(?:[A-Za-z_\x80-\uffff][\w\x80-\uffff]*)?\$|--[^\n\r]*|\/\*/g
const COMMENT_EDGE = /\/\*|\*\//g
const ENDS_TRANSACTION =
  /^(?:begin|start\s+transaction|commit|end|abort|rollback(?!(?:\s+(?:work|transaction))?\s+to\b)|prepare\s+transaction)\b/i

/** What ends, begins or prepares a transaction in a text of one or more statements, if anything does. */
export function transactionControl(sql: string): string | null {
  if (!SUSPECT.test(sql)) return null
  for (const statement of statements(sql)) {
    const [verb] = ENDS_TRANSACTION.exec(statement) ?? []
    if (verb !== undefined) return verb.toUpperCase()
  }
  return null
}

/** The statements of a text, without literals, quoted names and comments. */
export function statements(sql: string): string[] {
  return bare(sql)
    .split(';')
    .map((statement) => statement.trim())
    .filter(Boolean)
}

/** The text without literals, quoted names and comments. */
function bare(sql: string): string {
  let text = ''
  let at = 0
  for (TOKEN.lastIndex = 0; ; TOKEN.lastIndex = at) {
    const found = TOKEN.exec(sql)
    if (found === null) return text + sql.slice(at)
    const [token, name = ' '] = found
    text += sql.slice(at, found.index) + name
    at = TOKEN.lastIndex
    if (token === '/*') at = endOfComment(sql, found.index)
    else if (token.startsWith('$')) at = endOfQuote(sql, token, at)
  }
}

function endOfQuote(sql: string, tag: string, start: number): number {
  const end = sql.indexOf(tag, start)
  return end === -1 ? sql.length : end + tag.length
}

/** Block comments nest. */
function endOfComment(sql: string, start: number): number {
  COMMENT_EDGE.lastIndex = start
  for (let depth = 0; ; ) {
    const edge = COMMENT_EDGE.exec(sql)
    if (edge === null) return sql.length
    depth += edge[0] === '/*' ? 1 : -1
    if (depth === 0) return COMMENT_EDGE.lastIndex
  }
}
