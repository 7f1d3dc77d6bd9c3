const { join } = require('node:path')
const autoload = require('@fastify/autoload')

module.exports = async (app, options) => {
  app.register(autoload, { dir: join(__dirname, 'plugins-esm'), options: { ...options } })
  app.register(autoload, { dir: join(__dirname, 'routes'), options: { ...options } })
}
