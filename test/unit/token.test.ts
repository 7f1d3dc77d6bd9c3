import t from 'tap'
import { newToken } from '../../lib/operation/token.js'

t.test('tokens are never the same, for as many as there may be, and cannot be guessed', async (t) => {
  const tokens = Array.from({ length: 2_000 }, newToken)
  t.equal(new Set(tokens).size, tokens.length)
  t.ok(tokens.every((token) => /^[A-Za-z0-9_-]{22}$/.test(token)))
  t.equal(new Set(tokens.map((token) => token.slice(0, 10))).size, tokens.length, 'random from the beginning')
})
