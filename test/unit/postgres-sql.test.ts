import t from 'tap'
import { PostgresSql } from '../../lib/stores/postgres/statements.js'

/* What the statements say of names; what they do is tried on a real server, in stores/. */

t.test(
  'statements for the table in a schema are made once, and its name may come as PostgreSQL quotes it',
  async (t) => {
    const sql = new PostgresSql(null, 'keys')
    for (const [quoted, table] of [
      ['public', '"public"."keys"'],
      ['"Tenants"', '"Tenants"."keys"'],
      ['"say ""a"""', '"say ""a"""."keys"'],
      ['"o\'clock"', '"o\'clock"."keys"']
    ] as const) {
      const there = sql.in(quoted)
      t.equal(there, sql.in(quoted))
      t.not(there, sql)
      t.match(there.renew, `UPDATE ${table} SET`)
    }
    t.equal(sql.in('public'), sql.in('"public"'))
  }
)

t.test('a table whose schema is known stays in it', async (t) => {
  const sql = new PostgresSql('mine', 'keys')
  t.equal(sql.in('public'), sql)
  t.match(sql.renew, 'UPDATE "mine"."keys" SET')
})

t.test('a name is a literal where it is looked up', async (t) => {
  const { sweep } = new PostgresSql("o'clock", 'keys')
  t.match(sweep, `'"o''clock"."keys"'::regclass`)
})

t.test('processes of all versions do one at a time what one at a time has to do', async (t) => {
  const sql = new PostgresSql(null, 'keys')
  t.match(sql.createTable, "pg_advisory_xact_lock(hashtext('fastify-idempotency create'), 0)")
  t.match(sql.sweep, "pg_try_advisory_xact_lock(hashtext('fastify-idempotency sweep'), (")
})
