let runs = 0

module.exports = async (app) => {
  app.post('/orders', { config: { idempotency: true } }, async () => ({ run: ++runs }))
}
