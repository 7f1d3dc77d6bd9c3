let runs = 0

module.exports = async (app) => {
  app.get('/', async () => runs)
  app.post('/', { config: { idempotency: true } }, async () => ({ run: ++runs }))
  app.post('/refunds', { config: { idempotency: { required: true } } }, async () => ({ run: ++runs }))
}
