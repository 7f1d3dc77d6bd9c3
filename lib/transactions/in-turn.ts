/** The end of each line. */
const lines = new WeakMap<object, Promise<unknown>>()

/** Does one thing after another with what can do only one at a time. */
export function inTurn<T>(subject: object, work: () => Promise<T>): Promise<T> {
  const turn = (lines.get(subject) ?? Promise.resolve()).then(work)
  lines.set(
    subject,
    turn.catch(() => {})
  )
  return turn
}
