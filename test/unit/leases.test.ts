import t, { type Test } from 'tap'
import { keepAlive, letGo, type Renewable } from '../../lib/operation/leases.js'
import { until } from '../support/latch.js'

class Claim implements Renewable {
  readonly lease: number
  renewals = 0

  constructor(lease: number) {
    this.lease = lease
  }

  renew(): void {
    this.renewals++
  }
}

/** Notes for how long timers are set. */
function timers(t: Test): number[] {
  const { setTimeout } = globalThis
  t.teardown(() => Object.assign(globalThis, { setTimeout }))
  const asked: number[] = []
  const noting = (callback: () => void, ms: number) => {
    asked.push(ms)
    return setTimeout(callback, ms)
  }
  Object.assign(globalThis, { setTimeout: noting })
  return asked
}

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

t.test('a claim is renewed when a third of its lease has passed', async (t) => {
  const asked = timers(t)
  const claim = new Claim(60_000)
  keepAlive(claim)
  t.strictSame(asked, [20_000])
  letGo(claim)
})

t.test('the claims with the same lease share one timer, which does not keep the process alive', async (t) => {
  const before = holding()
  const asked = timers(t)
  const claims = Array.from({ length: 100 }, () => new Claim(90_000))
  for (const claim of claims) keepAlive(claim)
  t.strictSame(asked, [30_000])
  t.equal(holding(), before)
  for (const claim of claims) letGo(claim)
})

t.test('a claim is renewed once each time it asks, and one that was let go is not', async (t) => {
  const [once, twice, never] = [new Claim(30), new Claim(30), new Claim(30)]
  for (const claim of [once, twice, never]) keepAlive(claim)
  letGo(never)
  await until(() => twice.renewals === 1)
  keepAlive(twice)
  await until(() => twice.renewals === 2)
  t.equal(once.renewals, 1)
  t.equal(never.renewals, 0)
})

t.test('the shortest of leases is renewed like any other', async (t) => {
  const claim = new Claim(1)
  keepAlive(claim)
  await until(() => claim.renewals === 1)
  t.equal(claim.renewals, 1)
})
