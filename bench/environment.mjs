import { subjects } from './subjects/index.mjs'

/** The address of each subject's own corner of the servers. */
export function environmentOf(definition, servers) {
  return {
    redis: { path: servers.redisPath, db: 1 + subjects.indexOf(definition) },
    postgres: servers.postgresAddress,
    mysql: { socketPath: servers.mysqlSocket, database: 'test' }
  }
}
