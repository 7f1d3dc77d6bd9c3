// What the applications here have in common. Each has a run.js that fails when something is not as it should be.
const assert = require('node:assert/strict')

/** The boot of a server fails with this code, and its error names exactly these routes. */
exports.failsToBoot = async (app, code, routes) => {
  try {
    await assert.rejects(
      async () => app.ready(),
      (error) => {
        assert.equal(error.code, code, error.stack)
        assert.deepEqual(error.message.match(/[A-Z]+ \/[\w/]*/g), routes, error.message)
        return true
      }
    )
  } finally {
    await app.close()
  }
}

/** A POST with a key runs once: the second one is a replay. */
exports.runsOnce = async (app, url) => {
  const post = () => app.inject({ method: 'POST', url, headers: { 'idempotency-key': 'key' } })
  const first = await post()
  assert.equal(first.statusCode, 200, first.body)
  assert.equal(first.headers['idempotent-replayed'], undefined)
  const second = await post()
  assert.equal(second.headers['idempotent-replayed'], 'true')
  assert.equal(second.body, first.body)
}

exports.TOO_EARLY = 'FST_IDEMPOTENCY_ROUTE_TOO_EARLY'
exports.NOT_COVERED = 'FST_IDEMPOTENCY_NOT_COVERED'
