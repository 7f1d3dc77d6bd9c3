import { AssertionError } from 'node:assert'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import { MemoryStore } from '../../index.js'
import { type ConformanceCase, type StoreFactory, storeConformance } from '../../lib/testkit.js'
import type { IdempotencyStore } from '../../types/index.js'
import { brokenStores } from '../support/broken-stores.js'
import { ModelData, ModelStore } from '../support/model-store.js'
import { nodeTest } from '../support/node-test.js'

// The kit that tests stores: who keeps the promises passes, and who breaks one is told which.

/** The cases that fail, by their names, with what they say. All cases run at the same time. */
async function failures(factory: StoreFactory, cases = storeConformance(factory)): Promise<Map<string, unknown>> {
  const failed = new Map<string, unknown>()
  await Promise.all(cases.map(({ name, run }) => run().catch((error: unknown) => failed.set(name, error))))
  return failed
}

/** Whether one of several tries ends like that. */
async function oneOf(tries: number, attempt: () => Promise<boolean>): Promise<boolean> {
  for (let n = 0; n < tries; n++) if (await attempt()) return true
  return false
}

async function fails(run: ConformanceCase['run']): Promise<boolean> {
  return run().then(
    () => false,
    () => true
  )
}

function modelStores(): ReturnType<typeof Object.assign> {
  const data = new ModelData()
  const store = new ModelStore(data)
  return { store, second: new ModelStore(data), spoil: (key: string) => store.spoil(key), interrupt: () => {} }
}

/** A store with the four methods that it must have, and no more. */
function onlyFour(store: IdempotencyStore): IdempotencyStore {
  return {
    acquire: (key, claim) => store.acquire(key, claim),
    renew: (key, token, leaseMs) => store.renew(key, token, leaseMs),
    complete: (key, token, record, ttlMs) => store.complete(key, token, record, ttlMs),
    release: (key, token, unused) => store.release(key, token, unused)
  }
}

/** A store whose answers say more than they have to. */
function talkative(store: IdempotencyStore): IdempotencyStore {
  return { ...onlyFour(store), acquire: async (...asked) => ({ ...(await store.acquire(...asked)), at: Date.now() }) }
}

const correct: Record<string, StoreFactory> = {
  'a store': () => new MemoryStore(),
  'a promise of a store': async () => new MemoryStore(),
  'a store with two clients': modelStores,
  'a store with the four methods only': () => onlyFour(new MemoryStore()),
  'a store that says more than it has to': () => talkative(new MemoryStore())
}

for (const [name, factory] of Object.entries(correct)) {
  t.test(`${name} that keeps all promises fails no case`, async (t) => {
    t.strictSame([...(await failures(factory)).values()], [])
  })
}

t.test('stores may share their data, and cases may run at the same time and again and again', async (t) => {
  const data = new ModelData()
  const factory = () => ({ store: new ModelStore(data), second: new ModelStore(data) })
  const failed = await Promise.all([failures(factory), failures(factory)])
  t.strictSame(
    failed.flatMap((failed) => [...failed.values()]),
    []
  )
  t.strictSame([...(await failures(factory)).values()], [])
})

/** And cases that fail for the same reason. */
const MORE = '…'

/** The cases that each store fails, and no others. */
const caught: Record<string, string[]> = {
  'looks first and claims later': [
    'of 100 parallel claims by two clients exactly one is acquired',
    'of parallel claims of many keys exactly one of each key is acquired',
    'of 50 parallel takeovers by two clients exactly one is acquired',
    'of 50 parallel claims of a released key exactly one is acquired',
    MORE
  ],
  'looks first and renews later': [
    'a renewal or a repeated claim at the same moment does not undo a completion',
    'a renewal at the same moment does not undo a release',
    'of a renewal and a takeover at the same moment exactly one succeeds'
  ],
  'looks first and completes later': [
    'of a completion and a release at the same moment exactly one succeeds',
    'of a completion and a takeover at the same moment exactly one succeeds',
    MORE
  ],
  'looks first and releases later': [
    'of a completion and a release at the same moment exactly one succeeds',
    'of a release and a takeover at the same moment the later one finds what the earlier one left'
  ],
  'asks nobody for a token to renew': [
    'renew by another token is false and changes nothing',
    'renew of an abandoned claim by another token is false and changes nothing',
    'renew after a takeover is false and changes nothing',
    MORE
  ],
  'asks nobody for a token to complete': [
    'complete by another token is false and changes nothing',
    'complete of an abandoned claim by another token is false and changes nothing',
    'complete after a takeover is false and changes nothing',
    'complete by another token after the completion is false and changes nothing',
    'the record of whoever took over is not overwritten by the former owner',
    MORE
  ],
  'asks nobody for a token to release': [
    'release by another token is false and changes nothing',
    'release of an abandoned claim by another token is false and changes nothing',
    'release after a takeover is false and changes nothing',
    'releasing what another token has released is false',
    MORE
  ],
  'takes a lapsed claim from its owner': [
    'renew of a lapsed claim that nobody took is true',
    'complete of a lapsed claim that nobody took is true',
    'release of a lapsed claim that nobody took is true',
    'an attempt that took over and has lapsed can be released as well',
    'a lapsed claim that was renewed is safe from takeovers again',
    'a record lives for its ttl from the completion on, not from the claim',
    'step of a lapsed claim that nobody took is true',
    'a conflict shows the steps, and so does what is abandoned',
    'get shows the steps'
  ],
  'forgets who has completed': [
    'completing again with the same token is true again, and the first record stays',
    'of several completions with the same token at the same moment one record stays',
    'a claim with steps can be claimed again, renewed and completed by its owner'
  ],
  'forgets who has released': [
    'releasing a claim with steps again with the same token is true again, and changes nothing',
    'releasing again with the same token is true again while the key is free',
    'releasing an attempt again with the same token is true again, and changes nothing',
    'a first attempt that is released unused leaves the key free',
    'a claim that took over and is released unused leaves the key abandoned as it was found'
  ],
  'overwrites a record with a later one': [
    'completing again with the same token is true again, and the first record stays',
    'a repeated completion does not prolong the life of the record'
  ],
  'releases what is completed': [
    'releasing after the completion is false, and the record stays',
    'of a completion and a release at the same moment exactly one succeeds'
  ],
  'expires for those who read, and not for those who claim': [
    'an abandoned claim is remembered for retainMs, then forgotten',
    'a record lives for its ttl from the completion on, not from the claim',
    'of many parallel claims at the moment of expiry exactly one is acquired',
    MORE
  ],
  'never expires': [
    'an abandoned claim is remembered for retainMs, then forgotten',
    'a record lives for its ttl from the completion on, not from the claim',
    'get gives null for a key that was released, expired or forgotten',
    MORE
  ],
  'forgets a claim with its lease': ['a lapsed claim is abandoned, and stays so for those who do not take over', MORE],
  'remembers an abandoned claim for ever': ['an abandoned claim is remembered for retainMs, then forgotten', MORE],
  'remembers a renewed claim for no longer than before': [
    'a claim that was renewed outlives the time for which it was to be remembered'
  ],
  'lets a lease lapse early': [
    'a claim lapses after its lease, not before',
    'a renewed claim lives for the new lease from the renewal on',
    'a key that another token holds is running, with its fingerprint and what is left of its lease',
    MORE
  ],
  'lets a lease of 40 days overflow': ['a lease of 40 days does not lapse'],
  'renews for as long as it was claimed': ['a renewed claim lives for the new lease from the renewal on', MORE],
  'does not count attempts': [
    'whoever takes over an abandoned claim has the next attempt',
    'of 50 parallel takeovers by two clients exactly one is acquired',
    'renewing keeps the attempt',
    MORE
  ],
  'counts attempts over a release and an expiry': [
    'a record lives for its ttl from the completion on, not from the claim',
    'an abandoned claim is remembered for retainMs, then forgotten',
    MORE
  ],
  'forgets an interrupted attempt with the release of a later one': [
    'a claim that took over and is released is abandoned at once, with its attempt, and says that it has ended',
    'whoever takes over what was released has the next attempt, and can complete it',
    'of 50 parallel takeovers of a released attempt exactly one is acquired',
    'an attempt that took over and has lapsed can be released as well',
    'delete forgets an attempt that was released',
    MORE
  ],
  'remembers the release of a first attempt': [
    'release by the owner is true, by whichever client it comes',
    'a first attempt that is released unused leaves the key free',
    MORE
  ],
  'gives a claim back with its lease': [
    'a claim that took over and is released is abandoned at once, with its attempt, and says that it has ended',
    MORE
  ],
  'remembers what was given back for ever': [
    'a claim that was released with steps is remembered for retainMs from the release on, then forgotten with them',
    'an attempt that was released is remembered for retainMs from the release on, then forgotten'
  ],
  'remembers what was given back for as long as a release': [
    'an attempt that was released is remembered for retainMs from the release on, then forgotten',
    MORE
  ],
  'does not say that a claim has ended': [
    'a claim that took over and is released is abandoned at once, with its attempt, and says that it has ended',
    'what had ended has ended again when whoever took it over releases it unused',
    'get shows an attempt that was released, and leaves it so',
    MORE
  ],
  'says of all that is abandoned that it has ended': [
    'only what was released says that it has ended',
    'a claim that took over and is released unused leaves the key abandoned as it was found',
    'get shows an attempt that was released, and leaves it so',
    MORE
  ],
  'says whether a claim has ended by true or false': [
    'a lapsed claim is abandoned, and stays so for those who do not take over',
    MORE
  ],
  'counts attempts whose handler never ran': [
    'a claim that took over and is released unused leaves the key abandoned as it was found',
    'what had ended has ended again when whoever took it over releases it unused',
    'a claim that is repeated still knows what it took over',
    'get shows an attempt that was released, and leaves it so',
    'a claim that took over and is released unused leaves the steps with what it found'
  ],
  'takes back every attempt that is released': [
    'a claim that took over and is released is abandoned at once, with its attempt, and says that it has ended',
    MORE
  ],
  'says that what was taken over and given back unused has ended': [
    'a claim that took over and is released unused leaves the key abandoned as it was found',
    'a claim that is repeated still knows what it took over',
    'a claim that took over and is released unused leaves the steps with what it found'
  ],
  'forgets that what was taken over and given back unused had ended': [
    'what had ended has ended again when whoever took it over releases it unused',
    'get shows an attempt that was released, and leaves it so',
    'a claim that took over and is released unused leaves the steps with what it found'
  ],
  'keeps the fingerprint of a claim that was given back unused': [
    'a claim that took over and is released unused leaves the key abandoned as it was found',
    'what had ended has ended again when whoever took it over releases it unused',
    'a claim that is repeated still knows what it took over',
    'get shows an attempt that was released, and leaves it so',
    'a claim that took over and is released unused leaves the steps with what it found'
  ],
  'leaves what was given back to its former owner': [
    'whoever has released an attempt has no say in it any more',
    'a claim that took over and is released unused leaves the key abandoned as it was found',
    'releasing a claim with steps again with the same token is true again, and changes nothing'
  ],
  'knows who has given a claim back for its owner': [
    'whoever has released an attempt has no say in it any more',
    'releasing a claim with steps again with the same token is true again, and changes nothing'
  ],
  'gives back again what was given back': [
    'releasing an attempt again with the same token is true again, and changes nothing',
    'releasing a claim with steps again with the same token is true again, and changes nothing'
  ],
  'forgets what it took over when a claim is repeated': ['a claim that is repeated still knows what it took over'],
  'remembers a repeated claim for no longer than before': [
    'whoever acquires again is remembered for the retainMs of then'
  ],
  'keeps the fingerprint of a claim that is repeated': [
    'whoever acquires again is compared by the fingerprint of then',
    'a claim with steps can be claimed again, renewed and completed by its owner'
  ],
  'remembers what there is no need to remember': [
    'a claim that nothing is lost with is free when its lease has lapsed',
    MORE
  ],
  'counts the repeated claim as another attempt': [
    'the same token acquires again what it holds, with the same attempt',
    'the same token acquires again what it holds after its lease has lapsed',
    'parallel claims with the same token are all acquired, with the same attempt',
    'whoever took over acquires again with the same attempt',
    MORE
  ],
  'does not know its owner again': [
    'the same token acquires again what it holds, with the same attempt',
    'the same token acquires again what it holds after its lease has lapsed',
    'parallel claims with the same token are all acquired, with the same attempt',
    MORE
  ],
  'gives a completed key to its owner': [
    'a completed key is completed for everybody, its owner included, whoever wants to take over',
    MORE
  ],
  'takes over without being asked': ['a lapsed claim is abandoned, and stays so for those who do not take over', MORE],
  'looks at the clock twice': ['whoever asks to take over finds a key running until it is theirs, and never abandoned'],
  'never takes over': [
    'whoever takes over an abandoned claim has the next attempt',
    'of 50 parallel takeovers by two clients exactly one is acquired',
    MORE
  ],
  'counts the ttl from the claim': [
    'a record lives for its ttl from the completion on, not from the claim',
    'a completed key tells what is left of its ttl'
  ],
  'lets a ttl of 40 days overflow': [
    'a ttl of 40 days is kept',
    'a ttl of a thousand years is kept',
    'a ttl of the largest integer is kept'
  ],
  'takes no ttl for none': ['without a ttl a record never expires', MORE],
  'keeps a record for no longer than its claim': [
    'a record outlives the claim that it came from',
    'without a ttl a record never expires',
    MORE
  ],
  'begins the ttl anew with a replay': ['replaying does not prolong the life of the record', MORE],
  'tells the ttl as it was': [
    'replaying does not prolong the life of the record',
    'without a ttl a record never expires',
    'get shows a record and what is left of its ttl',
    MORE
  ],
  'tells no ttl as infinity': [
    'without a ttl a record never expires',
    'settle puts a record in the place of an abandoned claim',
    'get shows a record and what is left of its ttl'
  ],
  'tells numbers as text': ['a free key is acquired, with attempt 1', MORE],

  'keeps the record that it was given': [
    'what is done to a text record after it was stored does not change it',
    'what is done to a binary record after it was stored does not change it',
    'what is done to a tombstone after it was stored does not change it'
  ],
  'gives the record that it keeps': [
    'what is done to a text record that was replayed does not change it',
    'what is done to a binary record that was replayed does not change it',
    'what is done to a tombstone that was replayed does not change it',
    'what is done to what get has given does not change it'
  ],
  'keeps the headers that it was given': [
    'what is done to a text record after it was stored does not change it',
    'what is done to a binary record after it was stored does not change it'
  ],
  'keeps the body that it was given': [
    'what is done to a text record after it was stored does not change it',
    'what is done to a binary record after it was stored does not change it'
  ],
  'gives the body that it keeps': [
    'what is done to a text record that was replayed does not change it',
    'what is done to a binary record that was replayed does not change it',
    'what is done to what get has given does not change it'
  ],
  'reads a claim later than it was given': [
    'what is done to a claim of a free key after it was made does not change it',
    'what is done to a claim of a released key after it was made does not change it',
    'what is done to a claim of an abandoned key after it was made does not change it'
  ],

  'hears late': [
    'whoever listens hears when the key is completed immediately after the call',
    'whoever listens hears when the key is released immediately after the call',
    'whoever listens hears when the key is deleted immediately after the call',
    'one can listen to a key again and again',
    MORE
  ],
  'wakes nobody': [
    'whoever listens hears when the key is completed, by whichever client',
    'whoever listens hears when the key is released, by whichever client',
    'whoever listens hears when the key is deleted, by whichever client',
    'whoever listens to a claim that is taken over hears of its end',
    MORE
  ],
  'wakes one of several': [
    'each of several who listen hears when the key is completed',
    'each of several who listen hears when the key is released',
    'each of several who listen hears when the key is deleted',
    MORE
  ],
  'wakes those of its own client': [
    'whoever listens hears when the key is completed, by whichever client',
    'whoever listens hears when the key is released, by whichever client',
    'whoever listens hears when the key is deleted, by whichever client',
    MORE
  ],
  'wakes those who listen to any key': ['whoever listens hears nothing while nothing happens to the key'],
  'wakes nobody when a key is completed': [
    'whoever listens hears when the key is completed, by whichever client',
    'whoever listens hears when the key is completed immediately after the call',
    'whoever listens to a claim that its owner claims and renews again hears of its end',
    MORE
  ],
  'wakes nobody when a key is released': [
    'whoever listens hears when the key is released, by whichever client',
    'whoever listens hears when the key is released immediately after the call',
    MORE
  ],
  'wakes nobody when a key is deleted': [
    'whoever listens hears when the key is deleted, by whichever client',
    'whoever listens hears when the key is deleted immediately after the call',
    'each of several who listen hears when the key is deleted'
  ],
  'wakes nobody when a claim is given back that took over': [
    'whoever listens to a claim that took over hears when it is released',
    'whoever listens hears when a claim with steps is released'
  ],
  'wakes before it writes': ['whoever listens and looks in turn comes to see that the claim has ended', MORE],
  'wakes with every claim and renewal': ['whoever listens hears nothing while nothing happens to the key'],
  'listens where nothing runs': ['listening ends at once where no claim is running'],
  'listens to an abandoned claim': ['listening ends at once where no claim is running'],
  'listens for ever': ['listening ends when the signal aborts, and others go on'],
  'listens although it was called off before': ['listening ends at once when the signal has aborted before'],
  'ends all listening with one': ['listening ends when the signal aborts, and others go on'],
  'is deaf after its connection broke': [
    'whoever listens hears of what happens to the key although the connections broke meanwhile'
  ],
  'cannot listen again after its connection broke': ['one can listen again after the connections broke'],
  'loses its data when its connection breaks': [
    'a store whose connections broke answers again, and holds what it held',
    'whoever listens hears of what happens to the key although the connections broke meanwhile'
  ],

  'keeps bytes as text': [
    'a reply of every byte value comes back as it was stored, every time',
    'a reply of every byte value that counts as text comes back as it was stored, every time',
    'a reply of 1 MiB comes back as it was stored, every time',
    MORE
  ],
  'keeps text as base64': ['a text reply comes back as it was stored, every time', MORE],
  'takes everything for text': [
    'a reply of bytes that could be text comes back as it was stored, every time',
    'an empty body comes back as it was stored, every time',
    MORE
  ],
  'takes nothing for text': [
    'a text reply comes back as it was stored, every time',
    'an empty text comes back as it was stored, every time',
    MORE
  ],
  'does not say what is text': [
    'a text reply comes back as it was stored, every time',
    'a reply of bytes that could be text comes back as it was stored, every time',
    MORE
  ],
  'loses an empty body': [
    'an empty text comes back as it was stored, every time',
    'an empty body comes back as it was stored, every time'
  ],
  'gives bodies that are no buffers': ['a text reply comes back as it was stored, every time', MORE],
  'cuts a body at 64 KiB': [
    'a reply of 1 MiB comes back as it was stored, every time',
    'a reply of 1 MiB of text comes back as it was stored, every time'
  ],
  'joins the values of a header': [
    'a reply with headers of several values, in their order comes back as it was stored, every time',
    MORE
  ],
  'keeps headers as an object': [
    'a reply with headers of several values, in their order comes back as it was stored, every time'
  ],
  'makes a value of a single one': [
    'a reply with headers of several values, in their order comes back as it was stored, every time'
  ],
  'gives the time as a date': ['a reply of the earliest time comes back as it was stored, every time', MORE],
  'loses tombstones': [
    'a tombstone of a reply that was too large comes back as it was stored, every time',
    'a tombstone of a stream that failed comes back as it was stored, every time',
    'a tombstone of a hijacked reply comes back as it was stored, every time',
    MORE
  ],
  'gives the fingerprint of the claim': ['the fingerprint of a completed key is the one of its record', MORE],
  'takes what it cannot decode for nothing': [
    'a record that cannot be decoded is an error, and no answer and no free key, and others go on'
  ],
  'gives what it cannot decode': [
    'list leaves out what cannot be decoded, and shows the rest',
    'a record that cannot be decoded is an error, and no answer and no free key, and others go on'
  ],
  'throws where it cannot decode': [
    'a record that cannot be decoded is an error, and no answer and no free key, and others go on'
  ],

  'trims keys': [
    'keys are told apart whatever is in them',
    'keys are told apart that differ in case, in white space or in the form of a letter only'
  ],
  'folds the case of keys': ['keys are told apart that differ in case, in white space or in the form of a letter only'],
  'normalises keys': ['keys are told apart that differ in case, in white space or in the form of a letter only'],
  'cuts keys at 255 characters': ['keys of 20,000 characters are told apart by the last of them'],
  'ends keys at a NUL': [
    'keys are told apart whatever is in them',
    'keys are told apart that differ in case, in white space or in the form of a letter only'
  ],
  'keeps keys in an object': ['keys may be empty, or the names of other things'],
  'refuses an empty key': ['keys may be empty, or the names of other things'],
  'folds the case of tokens': [
    'tokens are told apart that differ in case, in white space or in the form of a letter only',
    'tokens of up to 255 bytes are told apart'
  ],
  'cuts tokens at 254 bytes': ['tokens of up to 255 bytes are told apart'],
  'trims fingerprints': ['fingerprints come back whatever is in them', MORE],
  'cuts fingerprints at 255 characters': ['a fingerprint of 20,000 characters comes back', MORE],

  'claims what it looks at': ['get gives null for a key that nobody claimed, and does not claim it', MORE],
  'takes over what it looks at': [
    'get shows an abandoned claim and its attempt, and leaves it so',
    'get shows an attempt that was released, and leaves it so',
    'get shows the steps'
  ],
  'prolongs what it looks at': ['get does not prolong the life of a record', MORE],
  'shows what was released': ['get gives null for a key that was released, expired or forgotten'],
  'shows nothing as undefined': ['get gives null for a key that nobody claimed, and does not claim it', MORE],
  'does not delete a record': ['delete forgets a record', MORE],
  'does not delete a running claim': ['delete takes a running claim from its owner', MORE],
  'has always deleted something': [
    'delete of a key that holds nothing is false',
    'delete forgets a record',
    'delete unless it is running leaves a running claim',
    'delete unless it is running forgets records and abandoned claims'
  ],
  'deletes everything': ['delete leaves other keys as they are', MORE],
  'cannot be closed twice': ['close can be called again and again', MORE],
  'closes what others use': ['close lets go of one client only, and of no data'],

  'asks nobody for a token to step': [
    'step by another token is false, and keeps nothing',
    'step after a takeover is false, and the heir keeps its own beside those of before',
    'a step that was refused does not keep a released key from being free',
    MORE
  ],
  'keeps the steps of former owners': [
    'step after a takeover is false, and the heir keeps its own beside those of before',
    'of a step and a takeover at the same moment the heir has the step, or it is refused'
  ],
  'keeps no steps of a lapsed claim': ['step of a lapsed claim that nobody took is true'],
  'takes a step that it has refused for one that it keeps': [
    'a step that was refused does not keep a released key from being free'
  ],
  'looks first and keeps a step later': [
    'of a step and a takeover at the same moment the heir has the step, or it is refused'
  ],
  'reads steps first and writes them later': ['steps at the same moment all stay'],
  'looks for a name first and keeps the step later': ['of steps of one name at the same moment one stays'],
  'overwrites a result with a later one': [
    'a step of a name that there is already is true, and the first result stays',
    'a step of a name that an earlier attempt has finished is true, and its result stays'
  ],
  'says no to a step that there is already': [
    'a step of a name that there is already is true, and the first result stays',
    'a step of a name that an earlier attempt has finished is true, and its result stays',
    'of steps of one name at the same moment one stays',
    MORE
  ],
  'knows a step again within its attempt only': [
    'a step of a name that an earlier attempt has finished is true, and its result stays'
  ],
  'sorts steps by their names': ['steps come back in the order in which they were stored', MORE],
  'folds the case of the names of steps': ['names of steps are told apart to the letter'],
  'ends results of steps at a NUL': ['results of steps come back whatever is in them'],
  'takes an empty result of a step for none': ['results of steps come back whatever is in them'],
  'cuts results of steps at 65,535 characters': ['results of steps of 64 KiB come back'],
  'tells that there are no steps': ['a free key is acquired, with attempt 1', MORE],
  'keeps the fingerprint of a claim with steps that is repeated': [
    'a claim with steps can be claimed again, renewed and completed by its owner'
  ],
  'gives steps to none but those who take over': [
    'whoever acquires again gets the steps',
    'steps at the same moment all stay',
    'of steps of one name at the same moment one stays',
    'what is done to the steps of an answer does not change them',
    'what is done to a step after it was stored does not change it'
  ],
  'shows steps to their owner only': [
    'settle lets an abandoned claim be as its owner would give it back',
    'a conflict shows the steps, and so does what is abandoned',
    'get shows the steps',
    'what is done to the steps of an answer does not change them'
  ],
  'does not show steps to those who look': ['get shows the steps'],
  'prolongs a lease by a step': ['a step does not change the lease'],
  'remembers a claim with steps for ever': [
    'a lapsed claim with steps is remembered for retainMs, then forgotten with them'
  ],
  'keeps the steps of what it has forgotten': [
    'a lapsed claim with steps is remembered for retainMs, then forgotten with them',
    'a claim that was released with steps is remembered for retainMs from the release on, then forgotten with them'
  ],
  'forgets a first attempt with steps when it is released': [
    'a claim with steps that is released is abandoned at once, says that it has ended, and can be taken over',
    'releasing a claim with steps again with the same token is true again, and changes nothing',
    'a claim that was released with steps is remembered for retainMs from the release on, then forgotten with them',
    MORE
  ],
  'forgets the steps of what is released': [
    'a claim with steps that is released is abandoned at once, says that it has ended, and can be taken over',
    'a claim that took over and is released unused leaves the steps with what it found',
    'step after the completion or the release is false',
    MORE
  ],
  'takes back a first attempt with steps': [
    'a claim with steps that is released is abandoned at once, says that it has ended, and can be taken over'
  ],
  'remembers a first attempt with steps that was released for ever': [
    'a claim that was released with steps is remembered for retainMs from the release on, then forgotten with them'
  ],
  'forgets who has released a claim with steps': [
    'releasing a claim with steps again with the same token is true again, and changes nothing'
  ],
  'forgets the steps of what is released unused': [
    'a claim that took over and is released unused leaves the steps with what it found'
  ],
  'gives the steps of what is completed': ['what is completed has no steps any more'],
  'says yes to a step of what is over': ['step after the completion or the release is false'],
  'gives the steps of what was deleted': ['delete forgets the steps'],
  'wakes nobody when a claim is given back that has steps': [
    'whoever listens hears when a claim with steps is released'
  ],
  'keeps the step that it was given': ['what is done to a step after it was stored does not change it'],
  'gives the steps that it keeps': ['what is done to the steps of an answer does not change them'],

  'deletes what is running although it must not': ['delete unless it is running leaves a running claim'],
  'deletes nothing unless it may delete what is running': [
    'delete unless it is running forgets records and abandoned claims'
  ],

  'lists leases in seconds': ['list shows running claims, and what is left of their leases'],
  'lists what has lapsed as if that were just now': ['list shows abandoned claims, and for how long they have been so'],
  'lists what has lapsed as if that were long ago': [
    'list shows abandoned claims, and for how long they have been so',
    'list shows what its owner has given back, as abandoned and ended',
    'get tells the same of a key as list'
  ],
  'does not list that a claim has ended': ['list shows what its owner has given back, as abandoned and ended'],
  'lists what was given back as running': ['list shows what its owner has given back, as abandoned and ended'],
  'lists every tombstone by the same reason': ['list shows replies by their status, and tombstones by their reason'],
  'lists every reply by the same status': ['list shows replies by their status, and tombstones by their reason'],
  'lists no ttl as infinity': ['list shows replies by their status, and tombstones by their reason'],
  'lists all kinds': ['list shows the kinds that it is asked for, and no others'],
  'lists one kind at a time': [
    'list shows the kinds that it is asked for, and no others',
    'list comes to an end, and shows every key on the way',
    'list leaves out what cannot be decoded, and shows the rest'
  ],
  'lists one page': ['list comes to an end, and shows every key on the way'],
  'lists the first page again and again': ['list comes to an end, and shows every key on the way'],
  'lists what was released': ['list does not show what is free: released, expired, forgotten or deleted'],
  'lists what has expired': ['list does not show what is free: released, expired, forgotten or deleted'],
  'lists keys as they might be in a URL': [
    'list shows a reply with a large body and many headers, and keys as they are'
  ],
  'takes over what it lists': ['list changes nothing', MORE],
  'prolongs what it lists': ['list changes nothing', MORE],
  'tells who gets a key nothing of how long it was abandoned': ['get tells the same of a key as list'],
  'tells who gets a key nothing of the attempt that runs': ['get tells the same of a key as list'],
  'cannot list beside what it cannot decode': ['list leaves out what cannot be decoded, and shows the rest'],

  'keeps what was settled for an hour': ['settle puts a record in the place of an abandoned claim'],
  'settles by a reply only': ['settle puts a record in the place of an abandoned claim'],
  'settles no tombstones': ['settle puts a record in the place of a tombstone'],
  'settles nothing as ended': [
    'settle lets an abandoned claim be as its owner would give it back',
    'settle of what has ended puts a record in its place, too',
    'settle as ended leaves the owner of before nothing to complete'
  ],
  'forgets what it settles as ended': [
    'settle lets an abandoned claim be as its owner would give it back',
    'settle of what has ended puts a record in its place, too',
    'settle as ended leaves the owner of before nothing to complete'
  ],
  'forgets the steps of what it settles as ended': [
    'settle lets an abandoned claim be as its owner would give it back'
  ],
  'settles nothing that has ended': [
    'settle lets an abandoned claim be as its owner would give it back',
    'settle of what has ended puts a record in its place, too'
  ],
  'settles what is running': ['settle leaves what is running, replied or free'],
  'settles what has a reply': ['settle leaves what is running, replied or free'],
  'settles what was released': ['settle leaves what is running, replied or free'],
  'settles what has expired': ['settle leaves what is running, replied or free'],
  'lets a tombstone be as if it were given back': ['settle lets no tombstone be as if it were given back'],
  'settles whatever the fingerprint is': ['settle leaves what has another fingerprint'],
  'trims the fingerprint of what it settles': ['settle leaves what has another fingerprint'],
  'leaves what it settles to the owner of before': ['settle by a record leaves the owner of before nothing'],
  'lets the owner of before complete what was settled as ended': [
    'settle as ended leaves the owner of before nothing to complete'
  ],
  'looks first and settles later': ['settle and a takeover at the same time are one after the other'],

  'shares nothing between clients': ['of 100 parallel claims by two clients exactly one is acquired', MORE],
  'does not answer': ['a free key is acquired, with attempt 1', MORE],
  'does not answer a completion': ['complete by the owner is true, by whichever client it comes', MORE],
  'throws where it should reject': ['a free key is acquired, with attempt 1', MORE],
  'answers without a promise': ['renew by the owner is true, by whichever client it comes', MORE],
  'answers with the number of rows': ['complete by the owner is true, by whichever client it comes', MORE],
  'rejects what it is asked': ['release by the owner is true, by whichever client it comes', MORE]
}

t.test('every broken store is known to be caught, by cases that there are', (t) => {
  t.strictSame(Object.keys(brokenStores).sort(), Object.keys(caught).sort())
  const names = new Set([MORE, ...storeConformance(() => new MemoryStore()).map(({ name }) => name)])
  for (const name of Object.values(caught).flat()) if (!names.has(name)) t.fail(`there is no case "${name}"`)
  t.end()
})

/** The cases that some broken store has failed. */
const failing = new Set<string>()

t.test('a store is caught that', async (t) => {
  t.jobs = 2
  await Promise.all(
    Object.entries(brokenStores).map(([name, factory]) =>
      t.test(name, { buffered: true }, async (t) => {
        const cases = storeConformance(factory, { timeout: 2_000 })
        const failed = await failures(factory, cases)
        for (const name of failed.keys()) failing.add(name)
        const expected = caught[name] ?? []
        const others = !expected.includes(MORE)
        for (const { name, run } of cases) {
          // All at once are a load, under which leases lapse that should not, and that hides what is a matter of time.
          const isExpected = expected.includes(name)
          if (isExpected) t.ok(failed.has(name) || (await oneOf(5, () => fails(run))), name)
          else if (failed.has(name) && others)
            t.ok(await oneOf(5, async () => !(await fails(run))), `${name}, but under load`)
        }
        t.ok(failed.size < cases.length, 'what it does not do wrong does not fail')
        for (const [name, error] of failed) {
          // What is closed at the end is not promised in any other case.
          if (name === 'close lets go of one client only, and of no data') continue
          if (!(error instanceof AssertionError)) t.fail(`${name} fails by ${error}`)
          else if (!error.message.startsWith(`${name}: `)) t.fail(`${name} says ${error.message}`)
        }
      })
    )
  )
})

t.test('there is no case that no store can fail', async (t) => {
  const cases = storeConformance(() => new MemoryStore())
  t.strictSame(
    cases.map(({ name }) => name).filter((name) => !failing.has(name)),
    []
  )
})

t.test('cases are named by sentences, each by another, and say what they are about', (t) => {
  const cases = storeConformance(() => new MemoryStore())
  t.equal(new Set(cases.map(({ name }) => name)).size, cases.length)
  for (const { name, about, run } of cases) {
    t.match(name, /^[a-zA-Z0-9][^.\n]+ [^.\n]*[^.\n ]$/)
    t.type(about, 'string')
    t.equal(run.length, 0, 'run takes nothing, as test runners pass things of their own')
  }
  t.end()
})

t.test('what fails says what was promised, what was found, and what should have been', async (t) => {
  const factory = brokenStores['forgets who has released'] as StoreFactory
  const name = 'releasing again with the same token is true again while the key is free'
  const error = (await failures(factory)).get(name) as AssertionError
  t.equal(error.message, `${name}: release: false instead of true`)
  t.match(error.stack, new RegExp(`^AssertionError \\[ERR_ASSERTION\\]: ${name}: release: false`))
  t.match(error, { actual: false, expected: true })
})

t.test('what a store rejects with can be seen', async (t) => {
  const factory = brokenStores['rejects what it is asked'] as StoreFactory
  const error = (await failures(factory)).get('release by the owner is true, by whichever client it comes') as Error
  t.match(error.message, /release rejected with Error: Not connected$/)
  t.match(error.cause, { message: 'Not connected' })
})

t.test('a case makes a store for itself when it runs, and disposes of it, whatever came of it', async (t) => {
  for (const Store of [
    MemoryStore,
    class extends MemoryStore {
      override async acquire(): Promise<never> {
        throw new Error('Not connected')
      }
    }
  ]) {
    let [made, disposed] = [0, 0]
    const cases = storeConformance(async () => {
      made++
      return {
        store: new Store(),
        async dispose() {
          await sleep(1)
          disposed++
        }
      }
    })
    t.equal(made, 0, 'nothing is made before')
    await Promise.allSettled(cases.map(({ run }) => run()))
    t.strictSame([made, disposed], [cases.length, cases.length])
  }
})

t.test('without dispose the stores are closed, each once', async (t) => {
  const closed: string[] = []
  class Closing extends MemoryStore {
    constructor(readonly name: string) {
      super()
    }
    override async close() {
      closed.push(this.name)
    }
  }
  const run = async (factory: StoreFactory) => {
    closed.length = 0
    await storeConformance(factory)[0]?.run()
    return [...closed]
  }
  t.strictSame(await run(() => new Closing('a')), ['a'])
  t.strictSame(await run(() => ({ store: new Closing('a') })), ['a'])
  const store = new Closing('a')
  t.strictSame(await run(() => ({ store, second: store })), ['a'])
  t.strictSame(await run(() => ({ store, dispose: () => closed.push('disposed') })), ['disposed'])
})

t.test('dispose, interrupt and spoil are methods of what the factory gives', async (t) => {
  class Setting {
    readonly store = new ModelStore()
    readonly called = new Set<string>()
    dispose() {
      this.called.add('dispose')
    }
    interrupt() {
      this.called.add('interrupt')
    }
    spoil(key: string) {
      this.called.add('spoil')
      this.store.spoil(key)
    }
  }
  const settings: Setting[] = []
  const failed = await failures(() => {
    const setting = new Setting()
    settings.push(setting)
    return setting
  })
  t.strictSame([...failed.values()], [])
  t.strictSame([...new Set(settings.flatMap(({ called }) => [...called]))].sort(), ['dispose', 'interrupt', 'spoil'])
})

t.test('a factory that fails, gives no store or does not answer fails the case', async (t) => {
  const first = (factory: unknown) => storeConformance(factory as StoreFactory, { timeout: 50 })[0] as ConformanceCase
  const failing = async () => {
    throw new Error('No database')
  }
  await t.rejects(first(failing).run(), { message: 'No database' })
  await t.rejects(
    first(() => {
      throw new Error('No database')
    }).run(),
    { message: 'No database' }
  )
  for (const nothing of [undefined, null, 'store', {}, { store: null }, { store: {} }]) {
    await t.rejects(first(() => nothing).run(), { name: 'TypeError', message: /factory has to give a store/ })
  }
  const { name, run } = first(() => new Promise(() => {}))
  await t.rejects(run(), { message: `${name}: Waited 50 ms in vain for the factory to give a store` })
})

t.test('a store that is made too late is disposed of all the same', async (t) => {
  const [disposed] = [new EventTarget()]
  const gone = once(disposed, 'gone')
  const factory = async () => {
    await sleep(100)
    return { store: new MemoryStore(), dispose: () => disposed.dispatchEvent(new Event('gone')) }
  }
  await t.rejects(storeConformance(factory, { timeout: 20 })[0]?.run() as Promise<void>, { message: /in vain/ })
  await gone
})

t.test('a dispose that fails or does not end fails the case, unless the case has failed itself', async (t) => {
  const run = (dispose: () => unknown, store: IdempotencyStore = new MemoryStore()) =>
    storeConformance(() => ({ store, dispose }), { timeout: 200 })[0]?.run() as Promise<void>
  const fail = async () => {
    throw new Error('Still in use')
  }
  await t.rejects(run(fail), { message: 'Still in use' })
  await t.rejects(
    run(() => new Promise(() => {})),
    { message: /Waited 200 ms in vain for dispose to end$/ }
  )
  const silent = { ...onlyFour(new MemoryStore()), acquire: () => new Promise<never>(() => {}) }
  await t.rejects(run(fail, silent), { message: /Waited 200 ms in vain for acquire to answer$/ })
})

t.test('a case ends although nothing else keeps the process alive', async (t) => {
  const kit = new URL('../../lib/testkit.js', import.meta.url).href
  const script = `
    import { storeConformance } from ${JSON.stringify(kit)}
    const never = () => new Promise(() => {})
    const factory = () => ({ acquire: never, renew: never, complete: never, release: never })
    const [{ run }] = storeConformance(factory, { timeout: 200 })
    await run().catch((error) => { process.exitCode = error.code === 'ERR_ASSERTION' ? 7 : 1 })
  `
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
    stdio: ['ignore', 'ignore', 'inherit']
  })
  t.teardown(() => child.kill('SIGKILL'))
  t.strictSame(await once(child, 'exit'), [7, null])
})

t.test('what is given to storeConformance is checked', (t) => {
  for (const factory of [undefined, null, new MemoryStore(), 'store']) {
    t.throws(() => storeConformance(factory as never), { name: 'TypeError', message: /takes a function/ })
  }
  for (const timeout of [0, -1, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 31, '1' as never, null as never]) {
    t.throws(() => storeConformance(() => new MemoryStore(), { timeout }), { name: 'RangeError', message: /"timeout"/ })
  }
  t.end()
})

t.test('the cases run with node:test', async (t) => {
  const [kit, index, broken] = ['../../lib/testkit.js', '../../index.js', '../support/broken-stores.js'].map((path) =>
    JSON.stringify(new URL(path, import.meta.url).href)
  )
  const cases = storeConformance(() => new MemoryStore())
  const good = await nodeTest(`
    import test from 'node:test'
    import { storeConformance } from ${kit}
    import { MemoryStore } from ${index}
    for (const { name, run } of storeConformance(() => new MemoryStore())) test(name, run)
  `)
  t.equal(good.code, 0, good.code === 0 ? 'it ends well' : good.output)
  t.match(good.output, new RegExp(`^# pass ${cases.length}$`, 'm'))

  const bad = await nodeTest(`
    import { describe, it } from 'node:test'
    import { storeConformance } from ${kit}
    import { brokenStores } from ${broken}
    describe('at the same time', { concurrency: true }, () => {
      const factory = brokenStores['forgets who has released']
      for (const { name, run } of storeConformance(factory)) it(name, run)
    })
  `)
  t.equal(bad.code, 1, bad.code === 1 ? 'it fails' : bad.output)
  t.match(bad.output, new RegExp(`^# pass ${cases.length - (caught['forgets who has released'] ?? []).length}$`, 'm'))
  t.match(bad.output, /not ok \d+ - releasing again with the same token is true again while the key is free/)
  t.match(bad.output, /release: false instead of true/)
})
