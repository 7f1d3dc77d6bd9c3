import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { credentialsOf } from '../../lib/http/credentials.js'

const of = (headers: Record<string, string | string[]>, socket: object = {}) =>
  credentialsOf({ headers, raw: { socket, rawHeaders: raw(headers) } } as unknown as FastifyRequest)

/** Names and values in turn, as they came. */
const raw = (headers: Record<string, string | string[]>) =>
  Object.entries(headers).flatMap(([name, values]) => [values].flat().flatMap((value) => [name, value]))

const certified = (fingerprint256: string | undefined) => ({
  encrypted: true,
  getPeerX509Certificate: () => (fingerprint256 === undefined ? undefined : { fingerprint256 })
})

t.test('who sends nothing of the kind has no credentials', async (t) => {
  t.equal(of({}), null)
  t.equal(of({ 'user-agent': 'curl', 'x-user': 'alice', 'x-forwarded-for': '1.2.3.4' }), null)
  t.equal(of({}, certified(undefined)), null)
  t.equal(credentialsOf({ headers: {}, raw: {} } as unknown as FastifyRequest), null)
})

t.test('each kind of credentials tells one caller from another', async (t) => {
  const kinds = [
    'authorization',
    'proxy-authorization',
    'x-api-key',
    'api-key',
    'x-auth-token',
    'x-access-token',
    'cookie'
  ]
  const all = kinds.flatMap((name) => [of({ [name]: 'alice' }), of({ [name]: 'bob' })])
  all.push(of({}, certified('alice')), of({}, certified('bob')))
  t.equal(new Set(all).size, all.length, 'and one kind from the other')
  t.notOk(all.includes(null))
  t.equal(of({ cookie: 'alice' }), of({ cookie: 'alice' }))
  t.equal(of({}, certified('alice')), of({}, certified('alice')))
})

t.test('the kinds of credentials go one before the other', async (t) => {
  const cookie = (value: string) => ({ cookie: value })
  const key = { 'x-api-key': 'k' }
  const bearer = { authorization: 'Bearer t' }
  const cert = certified('c')
  t.equal(of({ ...bearer, ...key, ...cookie('a') }, cert), of(bearer))
  t.equal(of({ ...key, ...cookie('a') }, cert), of(key))
  t.equal(of(cookie('a'), cert), of({}, cert), 'a cookie may change, a certificate need not')
})

t.test('of one kind everything counts', async (t) => {
  const app = { 'x-api-key': 'of the app' }
  t.not(of({ ...app, 'x-access-token': 'alice' }), of({ ...app, 'x-access-token': 'bob' }))
  const user = { authorization: 'Basic alice' }
  t.not(of({ ...user, 'proxy-authorization': 'a' }), of({ ...user, 'proxy-authorization': 'b' }))
  t.not(of({ 'x-api-key': 'a', 'api-key': 'b' }), of({ 'x-api-key': 'b', 'api-key': 'a' }))
  t.not(of({ 'x-api-key': 'a","api-key","b' }), of({ 'x-api-key': 'a', 'api-key': 'b' }))
  t.not(of({ 'x-api-key': ['a', 'b'] }), of({ 'x-api-key': ['a', 'c'] }))
})

t.test('a header without a value stands for nobody, and does not hide who it is', async (t) => {
  for (const empty of [{ authorization: '' }, { 'x-api-key': '' }, { authorization: '', 'x-api-key': '' }]) {
    t.equal(of(empty), null)
    t.equal(of({ ...empty, cookie: 'session=alice' }), of({ cookie: 'session=alice' }))
    t.equal(of(empty, certified('alice')), of({}, certified('alice')))
  }
  t.equal(of({ cookie: '' }), null)
})

t.test('what stands where a token should be is no token', async (t) => {
  for (const authorization of [
    'Bearer',
    'Bearer ',
    'Bearer null',
    'bearer undefined',
    'Basic',
    'null',
    'undefined',
    ' '
  ]) {
    t.equal(of({ authorization, cookie: 'session=alice' }), of({ cookie: 'session=alice' }), authorization)
  }
  for (const authorization of ['Bearer t', 'Basic YQ==', 't', 'nullable', 'Bearer nullable', 'bearertoken']) {
    t.not(of({ authorization, cookie: 'session=alice' }), of({ cookie: 'session=alice' }), authorization)
  }
})

t.test('what is for a proxy, where many may be one, hides nobody behind it', async (t) => {
  const proxy = { 'proxy-authorization': 'Basic shared' }
  for (const kind of ['authorization', 'x-api-key', 'cookie']) {
    t.not(of({ ...proxy, [kind]: 'alice' }), of({ ...proxy, [kind]: 'bob' }))
  }
  t.not(of(proxy, certified('alice')), of(proxy, certified('bob')))
})

t.test('a plain socket has no certificate, whatever it can be asked for', async (t) => {
  t.equal(of({}, { encrypted: false, getPeerX509Certificate: () => t.fail('was asked') }), null)
  t.equal(of({}, { getPeerX509Certificate: () => t.fail('was asked') }), null)
  t.equal(of({}, { encrypted: true }), null)
})
