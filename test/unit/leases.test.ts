import t, { type Test } from 'tap'
import { cancelRenewal, type Renewable, scheduleRenewal } from '../../lib/operation/leases.js'
import { until } from '../support/latch.js'

class Claim implements Renewable {
  readonly lease: number
  renewal: Renewable['renewal'] = null
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
  const noting = (callback: (...args: unknown[]) => void, ms: number, ...args: unknown[]) => {
    asked.push(ms)
    return setTimeout(callback, ms, ...args)
  }
  Object.assign(globalThis, { setTimeout: noting })
  return asked
}

/** Timers that keep the process alive. */
const holding = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length

t.test('a claim is renewed when a third of its lease has passed', async (t) => {
  const asked = timers(t)
  const claim = new Claim(60_000)
  scheduleRenewal(claim)
  t.strictSame(asked, [20_000])
  cancelRenewal(claim)
})

t.test('a renewal that is due does not keep the process alive', async (t) => {
  const before = holding()
  const claim = new Claim(90_000)
  scheduleRenewal(claim)
  t.equal(holding(), before)
  cancelRenewal(claim)
})

t.test('a renewal that is scheduled again is put off, not doubled', async (t) => {
  const [twice, later] = [new Claim(30), new Claim(90)]
  scheduleRenewal(twice)
  scheduleRenewal(twice)
  scheduleRenewal(later)
  await until(() => later.renewals === 1)
  t.equal(twice.renewals, 1)
})

t.test('a claim is renewed once each time it asks, and one that was let go is not', async (t) => {
  const [once, twice, never] = [new Claim(30), new Claim(30), new Claim(30)]
  for (const claim of [once, twice, never]) scheduleRenewal(claim)
  cancelRenewal(never)
  await until(() => twice.renewals === 1)
  scheduleRenewal(twice)
  await until(() => twice.renewals === 2)
  t.equal(once.renewals, 1)
  t.equal(never.renewals, 0)
})

t.test('the shortest of leases is renewed like any other', async (t) => {
  const claim = new Claim(1)
  scheduleRenewal(claim)
  await until(() => claim.renewals === 1)
  t.equal(claim.renewals, 1)
})
