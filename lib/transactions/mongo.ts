import type { Transactions } from '../../types/index.js'
import { selectedKey } from '../selected-key.js'
import { clock } from '../util/clock.js'
import { type Kept, once, VERSION } from './once.js'

/** What `mongoTransactions` needs of a session. */
export interface MongoSession {
  withTransaction(work: () => Promise<void>): Promise<unknown>
  endSession(): Promise<unknown>
}

/** What `mongoTransactions` needs of a client. */
export interface MongoConnection<Session> {
  startSession(): Session
}

/** What `mongoTransactions` needs of a collection. */
export interface MongoCollection {
  insertOne(...args: never[]): unknown
  updateOne(...args: never[]): unknown
  findOne(...args: never[]): unknown
  deleteOne(...args: never[]): unknown
  deleteMany(...args: never[]): unknown
}

type Call = (...args: object[]) => Promise<unknown>
type Calls = { [Name in keyof MongoCollection]: Call }

/**
 * Transactions of `mongodb`, on a replica set: `Tx` is the session. Expired steps go when the collection has an index
 * `{ expiresAt: 1 }` with `expireAfterSeconds: 0`.
 */
export function mongoTransactions<Session extends MongoSession>(
  client: MongoConnection<Session>,
  collection: MongoCollection
): Transactions<Session> {
  const steps = collection as unknown as Calls
  return {
    once({ operation, name, fingerprint, expiresAt }, work) {
      const id = { _id: `${operation}/${name}` }
      const commit = async (work: (session: Session) => Promise<string>, replacing: boolean) => {
        const session = client.startSession()
        let result = ''
        try {
          // It calls this again after conflicts, the insertion included.
          await session.withTransaction(async () => {
            const options = { session }
            if (replacing) await steps.deleteOne({ ...id, expiresAt: { $lte: new Date() } }, options)
            const document = { ...id, version: VERSION, fingerprint, expiresAt: expiresAt && new Date(expiresAt) }
            await steps.insertOne(document, options)
            result = await work(session)
            await steps.updateOne(id, { $set: { result } }, options)
          })
        } finally {
          await session.endSession()
        }
        return result
      }
      const find = async (): Promise<Kept | null> => {
        const found = (await steps.findOne(id)) as {
          version: number
          fingerprint: string
          result?: string
          expiresAt: Date | null
        } | null
        if (found === null) return null
        const { version, result = null, expiresAt } = found
        return {
          version,
          result,
          fingerprint: found.fingerprint,
          expired: expiresAt !== null && expiresAt.getTime() <= clock.date()
        }
      }
      return once({ commit, find }, fingerprint, work)
    },
    async forget(key, { scope } = {}) {
      const deleted = await steps.deleteMany({ _id: new RegExp(`^${selectedKey(key, scope)}/`) })
      return (deleted as { deletedCount: number }).deletedCount > 0
    }
  }
}
