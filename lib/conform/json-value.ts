/* What is said of values of JSON. */

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** The value at a JSON Pointer (RFC 6901); `undefined` for none. */
export function at(value: unknown, pointer: string): unknown {
  let found = value
  for (const name of pointer.split('/').slice(1)) {
    const member = name.replaceAll('~1', '/').replaceAll('~0', '~')
    if (typeof found !== 'object' || found === null || !Object.hasOwn(found, member)) return undefined
    found = (found as Record<string, unknown>)[member]
  }
  return found
}

/** The JSON Pointers of what differs between two values: of leaves, where both have them. */
export function differences(one: unknown, other: unknown, pointer = ''): string[] {
  if (typeof one !== 'object' || one === null || typeof other !== 'object' || other === null) {
    return one === other ? [] : [pointer]
  }
  return Object.keys(one)
    .filter((name) => Object.hasOwn(other, name))
    .flatMap((name) =>
      differences(
        (one as Record<string, unknown>)[name],
        (other as Record<string, unknown>)[name],
        `${pointer}/${name.replaceAll('~', '~0').replaceAll('/', '~1')}`
      )
    )
}
