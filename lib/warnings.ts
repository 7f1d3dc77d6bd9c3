/* Warnings of the process: for what is allowed, and hardly meant. Each is given once. */

const given = new Set<string>()

/**
 * A warning of the process for whoever runs the server, once for each text. `node --disable-warning=<code>` silences a
 * kind of them.
 */
export function warn(code: `FST_IDEMPOTENCY_${string}`, message: string): void {
  const warning = `${code} ${message}`
  if (given.has(warning)) return
  given.add(warning)
  process.emitWarning(message, { type: 'IdempotencyWarning', code })
}
