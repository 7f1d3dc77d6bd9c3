import { readFileSync } from 'node:fs'
import { startMariadb } from '../.build/test/support/mariadb.js'
import { startPostgres } from '../.build/test/support/postgres.js'
import { startRedis } from '../.build/test/support/redis.js'

/** The servers of a run, and what they have done so far. */
export async function startServers() {
  const redis = await startRedis({ config: ['--databases', '64'] })
  const postgres = await startPostgres({ config: { log_statement: 'none', synchronous_commit: 'off' } })
  const mariadb = await startMariadb()
  const control = await redis.client()
  const pool = postgres.pool({ max: 1 })
  const info = async (section) => parseInfo(await control.info(section))

  const [[{ version }]] = await mariadb.pool({ connectionLimit: 1 }).query('SELECT version() AS version')

  return {
    mysqlSocket: mariadb.socket,
    redisPath: redis.path,
    postgresAddress: { host: postgres.host, user: postgres.user, database: postgres.database },
    versions: {
      redis: (await info('server')).redis_version,
      postgres: (await pool.query('SHOW server_version')).rows[0].server_version.split(' ')[0],
      mariadb: version.split('-')[0]
    },
    control,

    /** Microseconds of CPU that the server of a store has used; NaN where there is no way to know. */
    async cpuOf(store) {
      if (store === 'redis') {
        const { used_cpu_sys, used_cpu_user } = await info('cpu')
        return (Number(used_cpu_sys) + Number(used_cpu_user)) * 1e6
      }
      if (store === 'mysql') return cpuOfProcess(mariadb.pid)
      if (store !== 'postgres') return 0
      const { rows } = await pool.query('SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()')
      return rows.reduce((sum, { pid }) => sum + cpuOfProcess(pid), 0)
    },

    /** Commands that Redis has run, those in scripts included, and what it spent on them. */
    async commands() {
      const counts = {}
      for (const [name, value] of Object.entries(await info('commandstats'))) {
        counts[name.replace('cmdstat_', '')] = Number(/calls=(\d+)/.exec(value)?.[1])
      }
      return counts
    },

    /** Changes of the data set, of which there are fewer than commands that could have made one. */
    async writes() {
      return Number((await info('persistence')).rdb_changes_since_last_save)
    },

    async memory() {
      return Number((await info('memory')).used_memory)
    },

    async close() {
      await redis.close()
      await postgres.close()
      await mariadb.close()
    }
  }
}

function parseInfo(text) {
  return Object.fromEntries(
    text.split('\r\n').flatMap((line) => (line.includes(':') ? [line.split(/:(.*)/s).slice(0, 2)] : []))
  )
}

/** Linux tells it in nanoseconds. */
function cpuOfProcess(pid) {
  try {
    return Number(readFileSync(`/proc/${pid}/schedstat`, 'latin1').split(' ')[0]) / 1_000
  } catch {
    return Number.NaN
  }
}
