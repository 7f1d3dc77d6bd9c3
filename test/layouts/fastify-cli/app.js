const { join } = require('node:path')
const autoload = require('@fastify/autoload')

module.exports = async (app, options) => {
  app.register(autoload, { dir: join(__dirname, 'plugins'), options: { ...options } })
  app.register(autoload, { dir: join(__dirname, 'routes'), options: { ...options } })
}
