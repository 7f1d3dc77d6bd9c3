import { createHash } from 'node:crypto'

/*
 * One key holds one operation, as one binary string:
 *
 *   kind     'P' a claim, 'E' one that was given back after its handler had run, 'A' one that was given back as what was
 *            abandoned when it took over, 'C' a record, 'R' released and free
 *   version  '1'
 *   length   one byte: the length of the token
 *   token    the owner's; behind all but 'P' it owns nothing any more, but a repeated completion or release is recognised
 *
 * Behind the token of 'P', 'E' and 'A': one byte, '1' when somebody waits, and `attempt:retainMs:found:fingerprint`. `found`
 * is what a claim took over, empty for a first attempt: 'E' when that was an 'E', else 'A', and the length of its fingerprint,
 * which stands before the claim's own. Behind a record's token: the record. Kind to token is called the owner.
 *
 * Steps stand behind the claim's own fingerprint, one after the other: the lengths of name and result in four bytes each, the
 * higher ones first, the name, and the result. To tell where they start, `found` ends with a comma and the length of that
 * fingerprint then. A claim without steps has neither.
 *
 * A claim's key expires after retainMs + leaseMs. So its lease has lapsed when PTTL is retainMs or less, and
 * no clock but that of Redis has a say. A claim that is not to be remembered is alive as long as it is there: in its last
 * millisecond PTTL is 0. What was given back expires after retainMs.
 */

/** A script, and the name that Redis gives it. */
export interface Script {
  readonly source: string
  readonly sha: string
}

export const script = (source: string): Script => ({ source, sha: createHash('sha1').update(source).digest('hex') })

/**
 * Parses what is claimed, or was, in `v`: where its flag byte is, its attempt, its retainMs, what it has found, the
 * fingerprint of that, its own, and its steps.
 */
const PARSE_CLAIM = `
local function parse(v)
  if string.sub(v, 2, 2) ~= '1' then error('damaged: another version') end
  local flag = 4 + string.byte(v, 3)
  local attempt, retain, found, length, ours, text = string.match(v, '^(%d+):(%d+):([AE]?)(%d*),?(%d*):()', flag + 1)
  local own = text + (tonumber(length) or 0)
  local steps = ours == '' and #v + 1 or own + tonumber(ours)
  if ours ~= '' and steps > #v then error('damaged steps') end
  return flag, tonumber(attempt), tonumber(retain), found, string.sub(v, text, own - 1), string.sub(v, own, steps - 1),
    string.sub(v, steps)
end`

/** Is there a step of this name? Steps that are not whole are an error. */
const HAS_STEP = `
local function has(steps, name)
  local at, found = 1, false
  while at <= #steps do
    local length, result, text = struct.unpack('>I4I4', steps, at)
    found = found or string.sub(steps, text, text + length - 1) == name
    at = text + length + result
  end
  if at ~= #steps + 1 then error('damaged steps') end
  return found
end`

/** The reverse of `parse`: what stands behind the flag byte. */
const FORMAT_CLAIM = `
local function format(attempt, retain, found, former, fingerprint, steps)
  local lengths = found == '' and '' or found .. #former
  if steps ~= '' then lengths = lengths .. ',' .. #fingerprint end
  return string.format('%d:%.0f:', attempt, retain) .. lengths .. ':' .. former .. fingerprint .. steps
end`

/**
 * The careful acquire, for what SET NX GET cannot decide: abandoned claims, released keys, and servers before
 * Redis 7 where NX excludes GET.
 *
 *   KEYS[1]  the key
 *   ARGV[1]  the owner that asks
 *   ARGV[2]  retainMs
 *   ARGV[3]  the fingerprint
 *   ARGV[4]  retainMs + leaseMs
 *   ARGV[5]  '1' when an abandoned claim may be taken over
 *
 * Returns {attempt}, or {attempt, steps} where there are some, when the key is the owner's now; else {0, value, PTTL, 1 when
 * abandoned}. What is damaged is not taken: who reads the value will see it.
 */
export const ACQUIRE = script(`${PARSE_CLAIM}${HAS_STEP}${FORMAT_CLAIM}
local v = redis.call('GET', KEYS[1])
local kind = v and string.sub(v, 1, 1)
local flag, attempt, found, former, steps = '0', 1, '', '', ''
if kind == 'P' or kind == 'E' or kind == 'A' then
  local left = redis.call('PTTL', KEYS[1])
  local whole, at, held, retain, before, its, fingerprint, kept = pcall(parse, v)
  if not (whole and pcall(has, kept)) then return {0, v, left, 0} end
  flag = string.sub(v, at, at)
  local alive = left > retain or retain == 0
  if string.sub(v, 1, #ARGV[1]) == ARGV[1] then
    attempt, found, former, steps = held, before, its, kept
  elseif alive or ARGV[5] ~= '1' then
    return {0, v, left, alive and 0 or 1}
  else
    attempt, found, former, steps = held + 1, kind == 'E' and 'E' or 'A', fingerprint, kept
  end
elseif kind and kind ~= 'R' then
  return {0, v, redis.call('PTTL', KEYS[1]), 0}
end
local claim = ARGV[1] .. flag .. format(attempt, ARGV[2], found, former, ARGV[3], steps)
redis.call('SET', KEYS[1], claim, 'PX', ARGV[4])
return steps == '' and {attempt} or {attempt, steps}`)

/**
 * Keeps a step with its claim, for as long as that is kept.
 *
 *   KEYS[1]  the key
 *   ARGV[1]  the owner
 *   ARGV[2]  the name
 *   ARGV[3]  the result
 *
 * Returns 1 when the claim is the owner's, and has a step of this name now, this one or one of before.
 */
export const STEP = script(`${PARSE_CLAIM}${HAS_STEP}${FORMAT_CLAIM}
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then return 0 end
local v = redis.call('GET', KEYS[1])
local flag, attempt, retain, found, former, fingerprint, steps = parse(v)
if has(steps, ARGV[2]) then return 1 end
local step = struct.pack('>I4I4', #ARGV[2], #ARGV[3]) .. ARGV[2] .. ARGV[3]
if steps == '' then
  local claim = string.sub(v, 1, flag) .. format(attempt, retain, found, former, fingerprint, step)
  redis.call('SET', KEYS[1], claim, 'KEEPTTL')
else
  redis.call('APPEND', KEYS[1], step)
end
return 1`)

/**
 * Renews any number of claims.
 *
 *   KEYS[n]      a key
 *   ARGV[2n-1]   its owner
 *   ARGV[2n]     leaseMs
 *
 * Returns for each key 1 when the claim is the owner's, and was renewed, else 0; or what is wrong with it. What is
 * wrong with the server, as that it only reads, is the error of the whole: clients have ways to deal with it.
 */
export const RENEW = script(`${PARSE_CLAIM}
local function renew(key, owner, lease)
  if redis.call('GETRANGE', key, 0, #owner - 1) ~= owner then return 0 end
  local _, _, retain = parse(redis.call('GET', key))
  redis.call('PEXPIRE', key, string.format('%.0f', retain + tonumber(lease)))
  return 1
end
local renewed = {}
for n, key in ipairs(KEYS) do
  local ok, result = pcall(renew, key, ARGV[2 * n - 1], ARGV[2 * n])
  if not ok then
    local text = type(result) == 'table' and result.err or tostring(result)
    local concerns_key = string.find(text, 'WRONGTYPE') or string.find(text, 'attempt to') or string.find(text, 'bad argument')
      or string.find(text, 'damaged')
    if not concerns_key then error(result, 0) end
    result = text
  end
  renewed[n] = result
end
return renewed`)

/**
 * Ends a claim by a record.
 *
 *   KEYS[1]  the key
 *   ARGV[1]  the owner
 *   ARGV[2]  the value to put in the claim's place; its owner differs from ARGV[1] in the kind only
 *   ARGV[3]  milliseconds until it expires, '' for never
 *   ARGV[4]  the channel of those who wait
 *
 * Returns 1 when the claim was the owner's, or when this has been done before. PUBLISH comes last and may be
 * refused (ACL): what is written counts all the same.
 */
export const COMPLETE = script(`
local n = #ARGV[1]
local v = redis.call('GETRANGE', KEYS[1], 0, n)
local owner = string.sub(v, 1, n)
if owner ~= ARGV[1] then
  return owner == string.sub(ARGV[2], 1, n) and 1 or 0
end
if ARGV[3] == '' then
  redis.call('SET', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
end
if string.sub(v, n + 1) == '1' then redis.pcall('PUBLISH', ARGV[4], '') end
return 1`)

/**
 * Gives a claim back: leaves the mark of its release where it was a first attempt without steps, or is not to be remembered;
 * else what is abandoned now.
 *
 *   KEYS[1]  the key
 *   ARGV[1]  the owner
 *   ARGV[2]  '1' when its handler never ran
 *   ARGV[3]  for how many milliseconds a release is remembered
 *   ARGV[4]  the channel of those who wait
 *
 * Returns 1 when the claim was the owner's, or when this has been done before.
 */
export const RELEASE = script(`${PARSE_CLAIM}${FORMAT_CLAIM}
local n = #ARGV[1]
local owner = redis.call('GETRANGE', KEYS[1], 0, n - 1)
local token = string.sub(ARGV[1], 2)
if owner ~= ARGV[1] then
  return (owner == 'R' .. token or owner == 'E' .. token or owner == 'A' .. token) and 1 or 0
end
local v = redis.call('GET', KEYS[1])
local flag, attempt, retain, found, former, fingerprint, steps = parse(v)
if (found == '' and steps == '') or retain == 0 then
  redis.call('SET', KEYS[1], 'R' .. token, 'PX', ARGV[3])
else
  local kind = 'E'
  if ARGV[2] == '1' and found ~= '' then kind, attempt, fingerprint = found, attempt - 1, former end
  local rest = '0' .. format(attempt, retain, '', '', fingerprint, steps)
  redis.call('SET', KEYS[1], kind .. token .. rest, 'PX', string.format('%.0f', retain))
end
if string.sub(v, flag, flag) == '1' then redis.pcall('PUBLISH', ARGV[4], '') end
return 1`)

/**
 * Marks a running claim, so that its end is published.
 *
 *   KEYS[1]  the key
 *
 * Returns 1 when there is a running claim to wait for.
 */
export const WATCH = script(`${PARSE_CLAIM}
if redis.call('GETRANGE', KEYS[1], 0, 0) ~= 'P' then return 0 end
local flag, _, retain = parse(redis.call('GET', KEYS[1]))
if redis.call('PTTL', KEYS[1]) <= retain then return 0 end
redis.call('SETRANGE', KEYS[1], flag - 1, '1')
return 1`)

/**
 *   KEYS[1]  the key
 *   ARGV[1]  the channel of those who wait
 *   ARGV[2]  left out, or '1' when a running claim is to stay
 *
 * Returns 1 when there was a claim or a record to forget.
 */
export const DELETE = script(`${PARSE_CLAIM}
local kind = redis.call('GETRANGE', KEYS[1], 0, 0)
if ARGV[2] and kind == 'P' then
  local _, _, retain = parse(redis.call('GET', KEYS[1]))
  if retain == 0 or redis.call('PTTL', KEYS[1]) > retain then return 0 end
end
redis.call('DEL', KEYS[1])
redis.pcall('PUBLISH', ARGV[1], '')
return (kind ~= '' and kind ~= 'R') and 1 or 0`)

/**
 * Ends what nobody is running, and has this fingerprint: an abandoned claim or one that was given back; or, by a record, a
 * tombstone. A reply is never replaced.
 *
 *   KEYS[1]  the key
 *   ARGV[1]  the fingerprint
 *   ARGV[2]  the channel of those who wait
 *   ARGV[3]  a record with its owner; or the owner alone of what is to be as if it had been given back now, of kind 'E'
 *   ARGV[4]  with a record: how the head of a tombstone of this fingerprint begins, which is JSON (record-codec.ts)
 *   ARGV[5]  with a record: milliseconds until it expires, '' for never
 *
 * Returns 1 when it was done, be it before: clients repeat what they have lost the answer to.
 */
export const SETTLE = script(`${PARSE_CLAIM}${FORMAT_CLAIM}
local function tombstone(v)
  local at = 4 + string.byte(v, 3)
  local head = string.match(v, '^....%z%z%z%z()', at)
  if string.sub(v, 2, 2) ~= '1' or not head then return false end
  local length = 0
  for n = at, at + 3 do length = length * 128 + string.byte(v, n) end
  local rest = head + #ARGV[4]
  if head + length ~= #v + 1 or string.sub(v, head, rest - 1) ~= ARGV[4] then return false end
  -- When it was, and a reason where a reply has its status.
  return string.match(v, '^[^,]+,"[^"]*"%]$', rest)
end
local v = redis.call('GET', KEYS[1])
local kind = v and string.sub(v, 1, 1)
local value, expiry = ARGV[3], ARGV[5]
local owner = string.sub(value, 1, 3 + string.byte(value, 3))
if v and string.sub(v, 1, #owner) == owner then return 1 end
local waited = false
if kind == 'C' then
  if not (ARGV[4] and tombstone(v)) then return 0 end
elseif kind == 'P' or kind == 'E' or kind == 'A' then
  local flag, attempt, retain, _, _, fingerprint, steps = parse(v)
  if fingerprint ~= ARGV[1] or retain == 0 or redis.call('PTTL', KEYS[1]) > retain then return 0 end
  waited = string.sub(v, flag, flag) == '1'
  if not ARGV[4] then
    value = value .. '0' .. format(attempt, retain, '', '', fingerprint, steps)
    expiry = string.format('%.0f', retain)
  end
else
  return 0
end
if expiry == '' then
  redis.call('SET', KEYS[1], value)
else
  redis.call('SET', KEYS[1], value, 'PX', expiry)
end
if waited then redis.pcall('PUBLISH', ARGV[2], '') end
return 1`)
