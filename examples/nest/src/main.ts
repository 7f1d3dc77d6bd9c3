import 'reflect-metadata'
import { NestFactory } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication } from '@nestjs/platform-fastify'
import { AppModule } from './app.module'
import { configure } from './configure'

async function main() {
  const app = await NestFactory.create<NestFastifyApplication>(AppModule, new FastifyAdapter())
  await configure(app)
  // SIGTERM closes the application, which waits for what runs.
  app.enableShutdownHooks()
  await app.listen(3000)
}

void main()
