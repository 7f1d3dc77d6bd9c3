// Who is tried, and what is said of each.
//
//   name          of the server in servers/
//   package       on npm; its version is read from the package
//   on            what it runs on here
//   redis         its server takes --store redis
//   install       what npm installs, where it is not in package.json: see "Peers that are not locked" in README.md
//   profile       what differs from profile.json; `null`: the peer has no such thing
//   declared      rules that its documents say it does not keep, and where: `declared` of the profile
//   settled       rules that its server cannot be tried for as it is: [outcome, reason], in place of what the suite says
//   note          what a reader of the table has to know
//
// Documents are named as they are in the package or its repository, at the version that is tried.

export const peers = [
  {
    name: 'fastify-idempotency',
    package: 'fastify-idempotency',
    on: 'Fastify 5',
    redis: true,
    profile: { replayHeader: 'Idempotent-Replayed' }
  },
  {
    name: 'express-idempotency',
    package: 'express-idempotency',
    on: 'Express 4',
    profile: { key: { required: false }, expiring: null, expiryMs: null }
  },
  {
    name: 'hono-idempotency',
    package: 'hono-idempotency',
    on: 'Hono 4',
    redis: true,
    install: ['hono-idempotency@0.9.1'],
    profile: { replayHeader: 'Idempotency-Replayed' },
    note: 'It reads bytes as text: they are others in the first reply already.',
    declared: {
      'other-query-no-reply': 'README, "Options": the fingerprint is of method, path and body',
      'by-value': 'README, "Options": the fingerprint is the SHA-256 of method, path and body'
    }
  },
  {
    name: 'idempot',
    package: '@idempot/fastify-middleware',
    on: 'Fastify 5',
    install: ['@idempot/fastify-middleware@1.3.0', '@idempot/sqlite-store@1.1.0', 'better-sqlite3@12.11.1'],
    profile: { replayHeader: 'x-idempotent-replayed' },
    settled: {
      'different-keys': [
        'declared',
        'docs/reference/errors.md, "Fingerprint Conflict": a body that was seen with another key is refused with 409'
      ]
    },
    note: 'Bodies carry a reference made of their key, because it refuses a body that it has seen with another key.'
  },
  {
    name: 'nestarc',
    package: '@nestarc/idempotency',
    on: 'NestJS 11',
    redis: true,
    install: ['@nestarc/idempotency@0.4.0'],
    profile: { replayHeader: 'Idempotency-Replayed' },
    declared: {
      'other-query-no-reply': 'README, "Scope": the request path without the query string'
    },
    note: 'Its README says that bytes and streams are not replayed, and the handler runs again. It does not see them in a `StreamableFile`, as NestJS has them.'
  },
  {
    name: 'node-idempotency',
    package: '@node-idempotency/fastify',
    on: 'Fastify 4',
    install: ['@node-idempotency/fastify@1.0.7'],
    profile: { replayHeader: 'Idempotent-Replayed' }
  },
  {
    name: 'powertools',
    package: '@aws-lambda-powertools/idempotency',
    on: 'Fastify 5, as API Gateway',
    // It counts in whole seconds, and rounds.
    profile: { replayHeader: 'Idempotent-Replayed', expiryMs: 2_000 },
    settled: Object.fromEntries(
      [
        'missing-key-400',
        'in-progress-409',
        'retry-after',
        'other-payload-422',
        'problem-details',
        'malformed-key-refused'
      ].map((rule) => [rule, ['not-applicable', "it wraps a function: headers and statuses are the application's"]])
    ),
    note: 'No layer of HTTP: it wraps functions. What it keeps is the result of one, which here is a whole response, as for API Gateway.'
  }
]

/** The profile of a peer: the common one with what is different. */
export function profileOf(common, { profile = {}, declared = {} }) {
  const merged = { ...common, declared }
  for (const [name, value] of Object.entries(profile)) {
    if (value === null) delete merged[name]
    else merged[name] = name === 'key' ? { ...common.key, ...value } : value
  }
  return merged
}
