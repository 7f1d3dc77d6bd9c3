/**
 * Milliseconds for which a store remembers who released a key, so that a release whose answer got lost can be
 * repeated and is still `true`. The key is free meanwhile.
 */
export const RELEASE_MEMORY_MS = 60_000
