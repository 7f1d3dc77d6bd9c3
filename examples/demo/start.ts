import { linesToPaste, readSettings } from '../settings.js'
import { startDemo } from './demo.js'

/* What `npm start` runs. */

const { PORT = '3000', HOST = '127.0.0.1' } = process.env
const settings = readSettings()
const { url, close } = await startDemo(settings, { host: HOST, port: Number(PORT) })

console.log(`A shop with this plugin and one without: open ${url}/

Behind it is a payments API, its keys ${settings.place}. Paste these into another terminal:
${linesToPaste(url, settings)}`)

for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => void close())
