import cluster from 'node:cluster'
import type { IdempotencyStore } from '../../../types/index.js'
import { warn } from '../../warnings.js'
import { innermost } from '../innermost.js'
import { MemoryStore } from './memory-store.js'

/** Warns of a store that only this process sees where others serve the same clients. */
export function warnOfSiblings(store: IdempotencyStore): void {
  if (!innermost(store).some((behind) => behind instanceof MemoryStore)) return
  if (!hasSiblings(cluster.isWorker, process.env)) return
  warn(
    'FST_IDEMPOTENCY_MEMORY_STORE',
    'MemoryStore is known to one process only, and this one is a worker of several: a retry that comes to another one ' +
      'runs its handler again. Give fastify-idempotency a store that all share, such as RedisStore or PostgresStore'
  )
}

/**
 * A worker of node:cluster, as in pm2's cluster mode, or one of several processes of pm2's fork mode: pm2 counts them in
 * NODE_APP_INSTANCE. Or a function on AWS Lambda, which starts another one for each request that comes meanwhile.
 */
export function hasSiblings(isWorker: boolean, env: NodeJS.ProcessEnv): boolean {
  const { NODE_APP_INSTANCE: instance, exec_mode: mode, AWS_LAMBDA_FUNCTION_NAME: lambda } = env
  if (isWorker || lambda !== undefined) return true
  return instance !== undefined && (mode !== 'fork_mode' || Number(instance) > 0)
}
