import { randomUUID } from 'node:crypto'
import t from 'tap'
import { BLOCKING, PLACES, POINTS, STEPS } from '../support/kill-steps-plan.js'
import { type KeyViolation, openScene, type Plan } from '../support/kill-steps-scene.js'
import { shuffled } from '../support/lists.js'
import { newSeed, Random } from '../support/random.js'

// Server processes that are killed before, in and after each step of a handler, and clients that ask again until
// they have an answer. Each transactional step has one effect, and so has each key of a step downstream; no finished step
// runs again, and there is one reply. That the check would see it otherwise is shown without one of the safeguards.

const factor = Number(process.env.FAULTS_FACTOR) || 1
t.setTimeout(480_000 * factor)

const random = new Random(newSeed())
t.comment(`SEED=${random.seed}`)

const { workers, books, check, meet, outlive, struck, requests } = await openScene(t, random)

const TRANSACTIONAL = STEPS.filter((step) => step.in !== 'service').map(({ name }) => name)

/** How many keys are killed together, of which one at most holds up SQLite. */
const TOGETHER = 8

/**
 * A key for each point and each place, in groups; in the long form once more, with further kills before. Handlers fail in
 * between.
 */
function groups(): Plan[][] {
  const plans = Array.from({ length: factor }, (_, round) =>
    PLACES.flatMap((place) =>
      POINTS.map((point, n): Plan => {
        const earlier = POINTS.filter((_, at) => at < n && random.chance(round / 2 / n))
        const fails = STEPS.filter(() => random.chance(0.2)).map(({ name }) => name)
        return { key: randomUUID(), place, kills: [...earlier, point], fails }
      })
    )
  ).flat()
  const isBlocking = ({ kills = [] }: Plan) => kills.some((point) => BLOCKING.has(point))
  const blocking = shuffled(plans.filter(isBlocking), random)
  const others = shuffled(
    plans.filter((plan) => !isBlocking(plan)),
    random
  )
  return blocking.map((plan) => [plan, ...others.splice(0, TOGETHER - 1)])
}

/** A key for each step after which the handler fails, in each place. */
function failing(): Plan[] {
  return PLACES.flatMap((place) => STEPS.map(({ name }): Plan => ({ key: randomUUID(), place, fails: [name] })))
}

t.test('each step is done once, wherever processes are killed and handlers fail', async (t) => {
  const plans = [...groups(), failing()]
  t.strictSame(await check(plans), [])
  t.comment(`${plans.flat().length} keys, ${requests()} requests, ${workers.deaths().size} kills`)
  t.ok(books.repeats > 0, `the service was called again ${books.repeats} times`)
  for (const point of POINTS) t.ok((struck.get(point) ?? 0) >= PLACES.length, `${struck.get(point)} kills ${point}`)
})

t.test('of two attempts at once, one does a transactional step', async (t) => {
  for (const step of TRANSACTIONAL) t.strictSame(await meet(step), [], step)
})

t.test('an owner whose lease has lapsed adds no step to that of its heir', async (t) => {
  for (const place of ['redis', 'postgres'] as const) {
    t.strictSame(await outlive(place), [], place)
  }
})

// ---- The check sees what it is there for

const kindsOf = (violations: KeyViolation[]) => new Set(violations.map(({ kind }) => kind))

t.test('the check fails where the row of a step is inserted behind its work', async (t) => {
  t.ok(kindsOf(await meet('order', 'memo last')).has('overlap'), 'two do the same at once')
})

t.test('the check fails where the row of a step is not in its transaction', async (t) => {
  const plan: Plan = { key: randomUUID(), place: 'redis', kills: ['order: after COMMIT'], sabotage: 'memo outside' }
  t.ok(kindsOf(await check([[plan]])).has('effects'), 'a step has two effects')
})

t.test('the check fails where a step is kept whoever brings it', async (t) => {
  t.ok(kindsOf(await outlive('postgres', 'no owner check')).has('result'), 'a step has two results')
})

t.test('the check fails where a release forgets the steps', async (t) => {
  const plan: Plan = { key: randomUUID(), place: 'postgres', fails: ['mail'], sabotage: 'steps lost' }
  t.ok(kindsOf(await check([[plan]])).has('again'), 'a step runs again')
})
