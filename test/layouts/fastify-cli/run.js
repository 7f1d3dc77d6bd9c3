// fastify-cli's test helper hands `skipOverride` to the application, which hands its options to every plugin.
const { join } = require('node:path')
const { build } = require('fastify-cli/helper.js')
const { runsOnce } = require('../kit.js')

async function main() {
  for (const file of ['app.js', 'app-esm.js']) {
    const app = await build([join(__dirname, file)], { skipOverride: true })
    await runsOnce(app, '/orders')
    await app.close()
  }
}
main()
