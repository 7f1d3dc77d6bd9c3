// @fastify/autoload, with the folders in both orders. Each server is made in a process that has not loaded the package,
// as in an application whose plugin file alone requires it.
const { spawnSync } = require('node:child_process')
const { join } = require('node:path')
const { failsToBoot, runsOnce, NOT_COVERED, TOO_EARLY } = require('../kit.js')

const ROUTES = ['POST /orders', 'POST /orders/refunds']
const cases = {
  'routes before plugins': async (app, load) => {
    load('routes')
    load('plugins')
    await failsToBoot(app, TOO_EARLY, ROUTES)
  },
  'a plugin file without fastify-plugin': async (app, load) => {
    load('encapsulated')
    load('routes')
    await failsToBoot(app, NOT_COVERED, ROUTES)
  },
  'plugins before routes': async (app, load) => {
    load('plugins')
    load('routes')
    await runsOnce(app, '/orders')
    await app.close()
  }
}

const [, , what] = process.argv
if (what === undefined) {
  for (const name of Object.keys(cases)) {
    const { status } = spawnSync(process.execPath, [__filename, name], { stdio: 'inherit' })
    if (status !== 0) process.exitCode = 1
  }
} else {
  const app = require('fastify')()
  const load = (folder) => app.register(require('@fastify/autoload'), { dir: join(__dirname, folder) })
  cases[what](app, load)
}
