// How a server is started: on PORT (any free one when there is none, or 0), on loopback, and it prints its URL. It ends
// when its standard input ends, or by a signal.

export const port = Number(process.env.PORT ?? 0)
export const host = '127.0.0.1'

/** `--store redis` or `--store memory` (the default). */
export const store = storeOf(process.argv.slice(2))
export const redisUrl = process.env.REDIS_URL ?? 'redis://127.0.0.1:6379'

/** @param {{ port: number } | string | null} address Of a server that listens. */
export function listening(address) {
  if (address === null || typeof address === 'string') throw new Error('The server has no port')
  console.log(`http://${host}:${address.port}`)
}

/** @param {string[]} args */
function storeOf(args) {
  const at = args.indexOf('--store')
  return at === -1 ? 'memory' : args[at + 1]
}
