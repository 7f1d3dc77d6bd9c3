/** What a `PostgresStore` needs of a pool of `pg`. */
export interface PostgresPool {
  query(...args: never[]): unknown
  connect(...args: never[]): unknown
  on(...args: never[]): unknown
}
