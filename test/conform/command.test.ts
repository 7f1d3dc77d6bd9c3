import { execFile } from 'node:child_process'
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { Parser } from 'tap-parser'
import { type ConformReport, conform, type Profile, type Reporter, written } from '../../lib/conform.js'
import { PROFILE, startEndpoint } from '../support/broken-endpoint.js'

// `fastify-idempotency conform`, and what is made of a report.

const cli = fileURLToPath(new URL('../../lib/cli.js', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'conform-'))
const profileFile = join(folder, 'profile.json')
writeFileSync(profileFile, JSON.stringify(PROFILE))

interface Ended {
  status: number
  out: string
  err: string
}

function command(...args: string[]): Promise<Ended> {
  return new Promise((resolve) => {
    execFile(process.execPath, [cli, ...args], (error, out, err) => {
      resolve({ status: error === null ? 0 : Number(error.code), out, err })
    })
  })
}

async function endpoint(t: Test, fault: string | null): Promise<string> {
  const { url, close } = await startEndpoint(fault)
  t.teardown(close)
  return url
}

/** Three rules, one of which fails, and one of which does not apply. */
const some = ['same-status', 'sequential-once', 'waiting']
const report = async (t: Test, options: { seed?: string; profile?: Profile } = {}): Promise<ConformReport> =>
  conform(await endpoint(t, 'same-status'), { profile: PROFILE, rules: some, ...options })

t.test('the exit status is 1 where a rule fails, and 0 where none does', async (t) => {
  const url = await endpoint(t, 'same-status')
  const args = (...rules: string[]) => [url, '--profile', profileFile, ...rules.flatMap((rule) => ['--rule', rule])]
  const bad = await command('conform', ...args('same-status'))
  t.match(bad, { status: 1, out: /✗ same-status: .*\n +failed: 201 became 200/ })
  t.match(bad.out, /curl -i -X POST 'http:/)
  t.match(await command('conform', ...args('same-body')), { status: 0, out: /✓ same-body/ })
})

t.test('--level says which rules count for the exit status', async (t) => {
  const url = await endpoint(t, 'retry-after')
  const args = ['conform', url, '--profile', profileFile, '--rule', 'retry-after']
  t.equal((await command(...args)).status, 1)
  t.equal((await command(...args, '--level', 'must')).status, 0)
})

t.test('--reporter writes to the output or to a file, as often as it is said', async (t) => {
  const url = await endpoint(t, null)
  const file = join(folder, 'report.xml')
  const args = ['--reporter', 'json', '--reporter', `junit=${file}`, '--rule', 'same-body', '--seed', 'abc']
  const { out } = await command('conform', url, '--profile', profileFile, ...args)
  t.match(JSON.parse(out), {
    seed: 'abc',
    countedBy: 'GET /executions',
    rules: [{ id: 'same-body', outcome: 'passed' }]
  })
  t.match(readFileSync(file, 'utf8'), /<testcase classname="must" name="same-body: [^"]+"\/>/)
})

t.test('what cannot be tried is said in a line, with exit status 2', async (t) => {
  const url = await endpoint(t, null)
  const profile = (text: string) => {
    const file = join(folder, `${Math.random()}.json`)
    writeFileSync(file, text)
    return file
  }
  for (const [args, err] of [
    [['conform'], /takes one URL/],
    [['try', url], /no command "try"/],
    [['conform', 'localhost:1'], /takes a URL of http or https/],
    [['conform', url, '--nothing'], /--nothing/],
    [['conform', url, '--reporter', 'pdf'], /text, tap, junit, json, html, got "pdf"/],
    [['conform', url, '--level', 'can'], /must, should, may, got "can"/],
    [['conform', url, '--rule', 'none'], /no rule "none"/],
    [['conform', url, '--max-requests', 'x'], /^--max-requests takes a positive integer/],
    [['conform', url, '--reporter', `tap=${join(folder, 'no', 'where')}`], /--reporter .*ENOENT/],
    [['conform', url, '--profile', join(folder, 'missing')], /--profile .*ENOENT/],
    [['conform', url, '--profile', profile('{')], /--profile .*JSON/],
    [['conform', url, '--profile', profile('{ "verb": "POST" }')], /profile option "verb" is not known/],
    [
      ['conform', url, '--profile', profile('{ "slow": { "delay": 1 } }')],
      /profile option "delay" of slow is not known/
    ],
    [['conform', url, '--profile', profile('{ "count": {} }')], /profile option "count" takes/],
    [['conform', url, '--profile', profile('{ "callers": [{}] }')], /profile option "callers" takes/],
    [['conform', url, '--profile', profile('{ "concurrency": 1 }')], /"concurrency" takes an integer of 2 or more/],
    [['conform', url, '--profile', profile('{ "body": {}, "otherBody": {} }')], /"otherBody" is the same as "body"/],
    [['conform', url, '--profile', profile('{ "callers": [{}, {}] }')], /same caller twice/],
    [['conform', url, '--profile', profile('{ "declared": { "x": "y" } }')], /there is no rule "x"/],
    [['conform', url], /does not accept the request of the profile: 401 .*Say in a profile/],
    [['conform', 'http://127.0.0.1:9/', '--profile', profileFile], /Nothing listens at http:/],
    [['conform', 'http://192.0.2.1/', '--profile', profileFile], /^--host does not name 192\.0\.2\.1/]
  ] as const) {
    const ended = await command(...args)
    t.match(ended, { status: 2, out: '', err }, args.join(' '))
    t.equal(ended.err.trim().split('\n').length, 1, ended.err)
  }
})

t.test('no member of a profile leads to another host', async (t) => {
  const url = await endpoint(t, null)
  const elsewhere = 'http://192.0.2.1/charges'
  const variant = { path: elsewhere }
  for (const profile of [
    { path: elsewhere },
    { otherPath: '//192.0.2.1/charges' },
    { documentation: elsewhere },
    { count: { url: elsewhere } },
    { slow: variant },
    { fail: variant },
    { binary: variant },
    { stream: variant },
    { large: variant },
    { expiring: variant }
  ]) {
    const refused = { code: 'FST_IDEMPOTENCY_INVALID_OPTION', message: /"hosts" does not name 192\.0\.2\.1/ }
    await t.rejects(conform(url, { profile: { ...PROFILE, ...profile } }), refused, JSON.stringify(profile))
  }
})

t.test('a server that ends before any rule was tried is an error', async (t) => {
  let requests = 0
  const server = createServer((_, response) => {
    response.writeHead(201, { connection: 'close' }).end(`{ "id": ${++requests} }`)
    if (requests === 2) server.close()
  })
  const url = await new Promise<string>((resolve) => {
    server.listen(0, '127.0.0.1', () => resolve(`http://127.0.0.1:${(server.address() as { port: number }).port}`))
  })
  await t.rejects(conform(url), { name: 'ConformError', message: /Nothing listens at .*, or what does ends/ })
})

t.test('a host that is named gets a warning, and is tried', async (t) => {
  t.match(await command('conform', 'http://192.0.2.1/', '--host', '192.0.2.1', '--timeout', '50ms'), {
    status: 2,
    err: /Requests are carried out at 192\.0\.2\.1.*\n.*(does not accept|Nothing listens)/
  })
})

t.test('the usage and the rules are printed', async (t) => {
  t.match(await command('--help'), { status: 0, out: /--profile FILE/ })
  t.match(await command(), { status: 2, out: /--profile FILE/ })
  t.match(await command('rules'), { status: 0, out: /^must +sequential-once: .*§2\.6]\n/ })
})

t.test('the same seed sends the same requests', async (t) => {
  const [one, other] = [await report(t, { seed: 'x' }), await report(t, { seed: 'x' })]
  const keys = ({ rules }: ConformReport) => JSON.stringify(rules).match(/[0-9a-f-]{36}/g)
  t.ok(keys(one))
  t.strictSame(keys(one), keys(other))
  const again = await endpoint(t, null)
  await conform(again, { profile: PROFILE, rules: ['same-body'], seed: 'x' })
  await t.rejects(conform(again, { profile: PROFILE, rules: ['same-body'], seed: 'x' }), {
    name: 'ConformError',
    message: /keys of the seed "x" are known/
  })
})

t.test('what is declared counts as declared, with the reason', async (t) => {
  const declared = { 'same-status': 'page 7 of its manual' }
  const { rules } = await report(t, { profile: { ...PROFILE, declared } })
  t.match(
    rules.find(({ id }) => id === 'same-status'),
    {
      outcome: 'declared',
      reason: '201 became 200 {"id":"…'.slice(0, 15)
    }
  )
  t.match(rules.find(({ id }) => id === 'same-status')?.reason, /; declared: page 7 of its manual$/)
})

t.test('beyond its limits, a run says so, and its exit status is 2', async (t) => {
  const url = await endpoint(t, null)
  const { rules, problems } = await conform(url, { profile: PROFILE, maxRequests: 5 })
  t.equal(rules[0]?.reason, 'the 5 requests are used up')
  t.ok(rules.every(({ outcome }) => outcome !== 'failed'))
  t.same(problems, ['the 5 requests are used up'])
  const ended = await command('conform', url, '--profile', profileFile, '--max-requests', '5')
  t.match(ended, { status: 2, out: /Problem: the 5 requests are used up/, err: /Not everything was tried/ })
})

t.test('what the profile says and is not so is a problem, with exit status 2, and accuses nobody', async (t) => {
  const url = await endpoint(t, null)
  const wrong = {
    ...PROFILE,
    slow: { body: { processing: 300 } },
    fail: { body: { failing: true } },
    anonymous: { authorization: 'Bearer bob' },
    binary: { path: '/charges' },
    large: { path: '/charges' }
  }
  const { rules, problems } = await conform(url, { profile: wrong })
  t.strictSame(
    rules.filter(({ outcome }) => outcome === 'failed'),
    []
  )
  for (const what of [
    '"slow" took',
    '"fail" does not fail',
    '"anonymous" is accepted',
    '"binary" is text',
    '"large" has'
  ]) {
    t.ok(
      problems.some((problem) => problem.includes(what)),
      what
    )
  }
  const file = join(folder, 'wrong.json')
  writeFileSync(file, JSON.stringify(wrong))
  t.match(await command('conform', url, '--profile', file, '--rule', 'binary-reply'), {
    status: 2,
    err: /"binary" is text/
  })
  const same = { ...PROFILE, count: { reply: '/amount' } }
  await t.rejects(conform(url, { profile: same }), { message: /\/amount of the reply is the same in two executions/ })
})

t.test('other payloads are those that are accepted with a key of their own, one for each member', async (t) => {
  const seen: unknown[] = []
  let number = 0
  const replies = new Map<string, string>()
  const server = createServer(async (request, response) => {
    const body = JSON.parse(Buffer.concat(await request.toArray()).toString())
    const key = String(request.headers['idempotency-key'])
    const isKnown = ['EUR', 'USD'].includes(body.currency)
    if (isKnown) seen.push(body)
    // Compares the amount alone.
    const reply = replies.get(`${key} ${body.amount}`) ?? JSON.stringify({ id: ++number })
    replies.set(`${key} ${body.amount}`, reply)
    response.writeHead(isKnown ? 201 : 400, { 'content-type': 'application/json' }).end(isKnown ? reply : '{}')
  })
  const url = await new Promise<string>((resolve) => {
    server.listen(0, '127.0.0.1', () => resolve(`http://127.0.0.1:${(server.address() as { port: number }).port}`))
  })
  t.teardown(() => server.close())
  const body = { currency: 'EUR', amount: 1, card: { number: '4242' } }
  const { rules } = await conform(url, { profile: { body }, rules: ['other-payload-no-reply'] })
  t.match(rules, [{ outcome: 'failed', exchanges: [{}, { curl: /"number":"4243"/ }] }])
  t.ok(seen.length > 5)
})

t.test('a server that ends is said to have ended, after which request, and no other rule fails', async (t) => {
  const { url, close } = await startEndpoint(null)
  const found = await conform(url, {
    profile: PROFILE,
    onRule: ({ id }) => void (id === 'same-status' && close())
  })
  const failed = found.rules.filter(({ outcome }) => outcome === 'failed')
  t.match(failed, [{ id: 'same-body', reason: 'the server stopped answering', exchanges: [{}] }])
  t.equal(found.rules.at(-1)?.reason, 'the server does not answer any more')
})

t.test('executions are counted by what replies say, or by a command, as the profile has it', async (t) => {
  const url = await endpoint(t, 'same-status')
  const { count: _, ...others } = PROFILE
  const rules = ['sequential-once', 'other-payload-not-executed']
  const found = await conform(url, { profile: others, rules })
  t.equal(found.countedBy, '/id of replies')
  t.match(found.rules, [{ outcome: 'passed' }, { outcome: 'not-decidable', reason: /not to be seen in replies/ }])
  const program = `fetch('${url}/executions').then((reply) => reply.json()).then(({ count }) => console.log(count))`
  const counter = `"${process.execPath}" -e "${program}"`
  const exact = await conform(url, { profile: { ...others, count: { command: counter } }, rules })
  t.match(exact.rules, [{ outcome: 'passed' }, { outcome: 'passed' }])
  await t.rejects(conform(url, { profile: { ...others, count: { command: 'echo 1' } }, rules }), {
    message: /counted 0|not carried out/
  })
})

t.test('TAP can be read: what does not apply is skipped', async (t) => {
  const text = written(await report(t), 'tap')
  const failures = await new Promise<unknown>((resolve) => new Parser(resolve).end(text))
  t.match(failures, { ok: false, count: 3, pass: 2, fail: 1, skip: 1, failures: [{ name: /^same-status/ }] })
})

t.test('JUnit has a suite for each level, and counts what fails and what is skipped', async (t) => {
  const text = written(await report(t), 'junit')
  t.match(text, /<testsuite name="must" tests="2" failures="1" skipped="0"/)
  t.match(text, /<testsuite name="may" tests="1" failures="0" skipped="1"/)
  t.match(text, /<failure message="201 became 200 \{&quot;id&quot;/)
})

t.test('the page shows the exchanges, and nothing of a reply is taken for HTML', async (t) => {
  const found = await report(t)
  const rules = found.rules.map((rule) => ({ ...rule, reason: '<script>' }))
  const page = written({ ...found, rules }, 'html')
  t.match(page, /<details>/)
  t.notMatch(page, /<script>/)
})

t.test('JSON is the report itself', async (t) => {
  const found = await report(t)
  t.strictSame(JSON.parse(written(found, 'json' satisfies Reporter)), found)
})
