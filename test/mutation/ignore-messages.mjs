// What errors and logs say in words is for people: no test should hold it letter by letter. Codes, statuses and
// protocol words are not among these, and are mutated.

const LOG_METHODS = new Set(['debug', 'info', 'warn', 'error', 'emitWarning'])
const ERROR_FACTORIES = new Set(['createError', 'expected'])

/** The words of an error or a log entry: which arguments of the call they are, or what an option's `takes` says. */
function messagesOf(node) {
  if (node.type === 'NewExpression') return node.arguments
  if (node.type === 'ObjectProperty') return node.key.name === 'takes' ? [node.value] : []
  if (node.type !== 'CallExpression') return []
  const { callee } = node
  if (callee.type === 'Identifier' && ERROR_FACTORIES.has(callee.name)) return [node.arguments[1]]
  if (callee.type === 'Super') return node.arguments
  const name = callee.type === 'MemberExpression' ? (callee.property.name ?? callee.property.id?.name) : undefined
  return LOG_METHODS.has(name) ? node.arguments : []
}

const isText = ({ type }) => type === 'StringLiteral' || type === 'TemplateLiteral' || type === 'BinaryExpression'

/** Only what is thrown or logged: `new Set([…])` has no text for an argument. */
export const strykerPlugins = [
  {
    kind: 'Ignore',
    name: 'messages',
    value: {
      shouldIgnore({ node, parent }) {
        if (parent === undefined || parent === null || !isText(node)) return undefined
        return messagesOf(parent).includes(node) ? 'words for people' : undefined
      }
    }
  }
]
