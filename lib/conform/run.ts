import { randomUUID } from 'node:crypto'
import { InvalidOption } from '../errors.js'
import { COUNT, checked, DURATION, listOf, type Rule as OptionRule, TEXT } from '../option-rules.js'
import { baseline, ConformError } from './baseline.js'
import { CountError } from './executions.js'
import { Ended, type Finding, notDecidable } from './finding.js'
import { completed, isLoopback, type Profile, placesOf } from './profile.js'
import { type ConformReport, type ReportedRule, reported } from './report.js'
import type { Rule } from './rule.js'
import { RULES } from './rules.js'
import { isBusy, Session } from './session.js'

export interface ConformOptions {
  /** What is said of the endpoint. Default: a JSON endpoint of POST that takes `{ "amount": 100 }`. */
  profile?: Profile
  /** Makes a run repeatable: the same keys, in the same order. Default: a random one, which the report has. */
  seed?: string
  /** Hosts besides those of this machine that may be sent requests, as in the URL: `'staging.example.com'`. Default: none. */
  hosts?: readonly string[]
  /** The rules to try, by their ids. Default: all. */
  rules?: readonly string[]
  /** How long a reply may take, in milliseconds or as a text such as `'10s'`. Default: 10 seconds. */
  timeout?: number | string
  /** How long everything may take; what is left then is not decidable. Default: 5 minutes. */
  maxDuration?: number | string
  /** How many requests may be sent; what is left then is not decidable. Default: `1000`. */
  maxRequests?: number
  /** Is told each rule as soon as it has been tried. */
  onRule?: (rule: ReportedRule) => void
}

const TEXTS: OptionRule = { takes: 'a list of strings', accepts: listOf((value) => typeof value === 'string') }
const OPTION_RULES: { readonly [Name in keyof ConformOptions]-?: OptionRule } = {
  profile: { takes: 'an object', accepts: (value) => typeof value === 'object' && value !== null },
  seed: TEXT,
  hosts: TEXTS,
  rules: TEXTS,
  timeout: DURATION,
  maxDuration: DURATION,
  maxRequests: COUNT,
  onRule: { takes: 'a function', accepts: (value) => typeof value === 'function' }
}

/**
 * Tries how an endpoint treats idempotency keys: sends it requests over HTTP, and says rule by rule what it found. Requests
 * are carried out there: never on a system that somebody uses.
 *
 * @param url The endpoint, such as `http://localhost:3000/charges`.
 * @throws ConformError where the endpoint cannot be tried: nobody answers, or not as the profile says
 * @throws FST_IDEMPOTENCY_INVALID_OPTION, which names the option or the member of the profile
 */
export async function conform(url: string | URL, options: ConformOptions = {}): Promise<ConformReport> {
  const given = checked<ConformOptions>(options, OPTION_RULES, { owner: 'conform ' })
  const ids = RULES.map(({ id }) => id)
  for (const id of given.rules ?? []) {
    if (!ids.includes(id)) throw new InvalidOption(`conform option "rules": there is no rule "${id}"`)
  }
  const hosts = given.hosts ?? []
  const base = allowed(url, undefined, hosts)
  const seed = given.seed ?? randomUUID().slice(0, 8)
  const { timeout = 10_000, maxDuration = 300_000, maxRequests = 1_000 } = given
  const profile = completed(given.profile ?? {}, ids)
  // A path of a profile may be a whole URL.
  for (const place of placesOf(profile)) allowed(place, base, hosts)
  const session = new Session(base, profile, seed, { timeout, maxDuration, maxRequests })
  const [date, begin] = [new Date().toISOString(), performance.now()]
  await baseline(session).catch((error) => unusable(error, base))
  await prepare(session).catch((error) => unusable(error, base))
  const rules: ReportedRule[] = []
  for (const rule of RULES) {
    if (given.rules !== undefined && !given.rules.includes(rule.id)) continue
    if (session.isGone) {
      rules.push(reported(rule, notDecidable('the server does not answer any more'), undefined))
      continue
    }
    const outcome = reported(rule, await findingOf(rule, session), profile.declared[rule.id])
    rules.push(outcome)
    given.onRule?.(outcome)
  }
  return {
    url: session.request().url.href,
    date,
    seed,
    countedBy: session.executions.by,
    requests: session.sent,
    durationMs: Math.round(performance.now() - begin),
    problems: session.problems,
    rules
  }
}

/** @throws FST_IDEMPOTENCY_INVALID_OPTION where it is no URL of a host that may be sent requests */
function allowed(url: string | URL, base: URL | undefined, hosts: readonly string[]): URL {
  if (!URL.canParse(String(url), base?.href)) {
    throw new InvalidOption(`conform takes a URL such as http://localhost:3000/charges, got ${url}`)
  }
  const place = new URL(url, base)
  if (!/^https?:$/.test(place.protocol)) throw new InvalidOption(`conform takes a URL of http or https, got ${place}`)
  if (isLoopback(place.hostname) || hosts.includes(place.hostname)) return place
  throw new InvalidOption(
    `conform option "hosts" does not name ${place.hostname}, which is not this machine. Requests are carried out there: ` +
      'name it only if it is a test system'
  )
}

/** Learns what rules need to know. Where a limit is reached, they will say so. */
async function prepare(session: Session): Promise<void> {
  try {
    await session.tryOthers()
    await session.measureSlow()
  } catch (error) {
    if (!(error instanceof Ended) || session.isGone) throw error
  }
}

async function findingOf(rule: Rule, session: Session): Promise<Finding> {
  try {
    const finding = await rule.check(session)
    const [first] = finding.shown
    // A server that limits rates, or is overloaded, has said nothing of the rule.
    if (finding.outcome === 'failed' && first !== undefined && isBusy(first.exchange)) {
      session.say(`the server refuses requests with ${first.exchange.reply?.status}: it limits them, or is overloaded`)
      return { ...finding, outcome: 'not-decidable' }
    }
    return finding
  } catch (error) {
    if (error instanceof Ended) return error.finding
    if (!(error instanceof CountError)) throw error
    return error.isGone ? session.gone(null) : notDecidable(error.message)
  }
}

function unusable(error: unknown, base: URL): never {
  if ((error instanceof Ended && error.finding.outcome === 'failed') || (error instanceof CountError && error.isGone)) {
    throw new ConformError(`Nothing listens at ${base.origin}, or what does ends at the first requests`)
  }
  if (error instanceof Ended || error instanceof CountError) throw new ConformError(error.message)
  throw error
}
