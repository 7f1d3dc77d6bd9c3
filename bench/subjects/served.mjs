/** A Fastify app as a subject: requests in process, and on a socket. */
export function served(app, close = async () => {}) {
  return {
    inject: (request) => app.inject(request),
    listen: async () => {
      await app.listen({ host: '127.0.0.1', port: 0 })
      return app.server.address().port
    },
    close: async () => {
      await app.close()
      await close()
    }
  }
}
