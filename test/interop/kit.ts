import { randomUUID } from 'node:crypto'
import type { FastifyInstance, InjectOptions } from 'fastify'

/** When our plugin is registered, seen from the neighbour. */
export const orders = ['before', 'after'] as const
export type Order = (typeof orders)[number]

/** Registers our plugin before or after its neighbour. */
export async function register(
  order: Order,
  ours: () => PromiseLike<unknown>,
  theirs: () => PromiseLike<unknown>
): Promise<void> {
  for (const next of order === 'before' ? [ours, theirs] : [theirs, ours]) await next()
}

export interface Post {
  /** @default '/' */
  url?: string
  /** @default a new one */
  key?: string
  headers?: Record<string, string>
  /** @default {} */
  payload?: NonNullable<InjectOptions['payload']>
}

/** A keyed POST that needs no socket. */
export function post(app: FastifyInstance, { url = '/', key = randomUUID(), headers = {}, payload = {} }: Post = {}) {
  return app.inject({ method: 'POST', url, headers: { 'idempotency-key': key, ...headers }, payload })
}

/** Does the reply say of itself that it comes from the store? */
export function isReplay({ headers }: { headers: object }): boolean {
  return (headers as Record<string, unknown>)['idempotent-replayed'] === 'true'
}

/** Values of a header that may come several times, as in `set-cookie`. */
export function all(value: string | string[] | number | undefined): string[] {
  return value === undefined ? [] : [value].flat().map(String)
}
