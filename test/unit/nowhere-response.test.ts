import { IncomingMessage } from 'node:http'
import { Socket } from 'node:net'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import t from 'tap'
import { NowhereResponse } from '../../lib/http/discarding-response.js'

function open() {
  const ends: number[] = []
  const response = new NowhereResponse(new IncomingMessage(new Socket()), () => ends.push(response.statusCode))
  return { response, ends }
}

t.test('takes a stream to its end, as a response would', async (t) => {
  const { response, ends } = open()
  response.writeHead(202)
  await pipeline(Readable.from(['a', Buffer.from('b')]), response)
  t.same(ends, [202])
})

t.test('every write is taken, and called back', async (t) => {
  const { response } = open()
  const called = new Promise<void>((resolve) => {
    t.equal(
      response.write('a', 'utf8', () => resolve()),
      true
    )
  })
  await called
  t.equal(response.write('b'), true)
})

t.test('its end is told once, by callback and by the events of a response', async (t) => {
  const { response, ends } = open()
  const told: string[] = []
  for (const event of ['prefinish', 'finish', 'close']) response.on(event, () => told.push(event))
  const closed = new Promise((resolve) => response.once('close', resolve))
  response.end('a', () => told.push('callback'))
  t.ok(response.writableEnded)
  response.end()
  await closed
  await new Promise(setImmediate)
  t.same(told, ['callback', 'prefinish', 'finish', 'close'])
  t.equal(ends.length, 1)
})
