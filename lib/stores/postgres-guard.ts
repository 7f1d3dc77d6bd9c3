import type { TransactionClient } from '../../types/index.js'
import { TransactionBroken } from '../errors.js'

/** Statements that would begin or end a transaction; most have none of these words, and are not looked at closely. */
const SUSPECT = /\b(?:begin|start|commit|end|abort|rollback|prepare)\b/i
/**
 * The tokens that matter: names first, because they may hold dollars; then what may hold such a word without
 * meaning it, whole but for a block comment.
 */
const TOKEN =
  /[eE]'(?:[^'\\]|\\[\s\S]|'')*'|([A-Za-z_\x80-\uffff][\w$\x80-\uffff]*)|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$((?:[A-Za-z_\x80-\uffff][\w\x80-\uffff]*)?)\$[\s\S]*?\$\2\$|--[^\n\r]*|\/\*/g
const COMMENT_EDGE = /\/\*|\*\//g
const ENDS_TRANSACTION =
  /^(?:begin|start\s+transaction|commit|end|abort|rollback(?!(?:\s+(?:work|transaction))?\s+to\b)|prepare\s+transaction)\b/i

/** What ends, begins or prepares a transaction in a text of one or more statements, if anything does. */
export function transactionControl(sql: string): string | null {
  if (!SUSPECT.test(sql)) return null
  for (const statement of bare(sql).split(';')) {
    const [verb] = ENDS_TRANSACTION.exec(statement.trim()) ?? []
    if (verb !== undefined) return verb.toUpperCase()
  }
  return null
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
    at = token === '/*' ? endOfComment(sql, found.index) : TOKEN.lastIndex
  }
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

/** A client that a handler can do everything with but end its transaction. */
export class Guard {
  readonly client: TransactionClient
  /** Is the transaction over? Then the client belongs to somebody else. */
  over = false

  constructor(client: TransactionClient) {
    const query = (...args: unknown[]) => {
      this.#check(args[0])
      return client.query(...(args as [string]))
    }
    this.client = new Proxy(client, {
      get: (target, name) => {
        if (name === 'query') return query
        if (name === 'release' || name === 'end' || name === 'connect') return refuseToLetGo
        const value: unknown = Reflect.get(target, name, target)
        return typeof value === 'function' && name !== 'constructor' ? value.bind(target) : value
      }
    })
  }

  #check(query: unknown): void {
    if (this.over) throw new TransactionBroken('The transaction is over: its handler has replied')
    const text = typeof query === 'string' ? query : (query as { text?: unknown } | null)?.text
    const control = typeof text === 'string' ? transactionControl(text) : null
    if (control === null) return
    throw new TransactionBroken(
      `The transaction ends with the reply, and by itself: ${control} is not for its handler, which may use SAVEPOINT`
    )
  }
}

function refuseToLetGo(): never {
  throw new TransactionBroken('The client of a transaction goes back to its pool with the reply, and by itself')
}
