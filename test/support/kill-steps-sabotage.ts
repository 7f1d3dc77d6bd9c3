import type { Pool, PoolClient } from 'pg'
import type { PostgresStore, Transactions } from '../../index.js'
import { CLAIMS, type Sabotage } from './kill-steps-plan.js'

// What steps are kept in, without one of the safeguards.

const MEMO =
  'INSERT INTO idempotency_steps (operation, step, fingerprint, expires_at, result) VALUES ($1, $2, $3, $4, $5)'
const FIND = 'SELECT result, fingerprint FROM idempotency_steps WHERE operation = $1 AND step = $2'

/** Transactions whose row of a step comes behind its work: as their last statement, or when they are committed. */
export function late(pool: Pool, sabotage: 'memo last' | 'memo outside'): Transactions<PoolClient> {
  return {
    async once({ operation, name, fingerprint, expiresAt }, work) {
      const find = async () => (await pool.query(FIND, [operation, name])).rows[0]
      const before = await find()
      if (before !== undefined) return { ...before, resumed: true }
      const client = await pool.connect()
      try {
        await client.query('BEGIN')
        const result = await work(client)
        const memo = [operation, name, fingerprint, expiresAt, result]
        if (sabotage === 'memo last') await client.query(MEMO, memo)
        await client.query('COMMIT')
        if (sabotage === 'memo outside') await client.query(MEMO, memo)
        return { result, fingerprint, resumed: false }
      } catch (error) {
        await client.query('ROLLBACK')
        const after = await find()
        if (after !== undefined) return { ...after, resumed: true }
        throw error
      } finally {
        client.release()
      }
    },
    forget: async () => false
  }
}

/** A store without a safeguard for some keys. */
export function weakened(
  store: PostgresStore,
  pool: Pool,
  sabotageOf: (key: string) => Sabotage | undefined
): PostgresStore {
  const { release, step } = store
  store.release = async (key, ...rest) => {
    const isReleased = await release.call(store, key, ...rest)
    if (sabotageOf(key) === 'steps lost') await pool.query(`UPDATE ${CLAIMS} SET steps = NULL WHERE key = $1`, [key])
    return isReleased
  }
  store.step = async (key, token, finished) => {
    if (sabotageOf(key) !== 'no owner check') return step.call(store, key, token, finished)
    const { rows } = await pool.query(`SELECT token FROM ${CLAIMS} WHERE key = $1`, [key])
    await step.call(store, key, rows[0]?.token, finished)
    return true
  }
  return store
}
