import { availableParallelism, totalmem } from 'node:os'

/** The machine's size, without its maker: ratios are all that is shown. */
export function describeMachine({ redis, postgres, mariadb }) {
  const memory = Math.round(totalmem() / 2 ** 30)
  const cores = availableParallelism()
  return `${cores} cores, ${memory} GiB, Node ${process.versions.node}, Redis ${redis}, PostgreSQL ${postgres} (synchronous_commit off), MariaDB ${mariadb} (flush_log_at_trx_commit 0)`
}
