import Fastify from 'fastify'
import { COVERED, UNCOVERED } from './route.mjs'
import { served } from './served.mjs'

/** Fastify and the handler, nothing else. */
export async function bare({ route }) {
  const app = Fastify()
  app.post(COVERED, route.handle)
  app.post(UNCOVERED, route.handle)
  await app.ready()
  return served(app)
}
