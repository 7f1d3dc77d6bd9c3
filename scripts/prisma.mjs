// Makes the Prisma client of test/orms/schema.prisma that the tests use, as `prisma generate` does. That command wants an engine
// that it downloads. The generator is there without, and so is the client, which is WebAssembly.

import { rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'

// As ES modules they do not load.
const require = createRequire(import.meta.url)
const { PrismaClientTsGenerator } = require('@prisma/client-generator-ts')
const { getGenerators, loadSchemaContext } = require('@prisma/internals')

const folder = new URL('../test/orms/', import.meta.url)
rmSync(new URL('prisma/', folder), { recursive: true, force: true })
const schemaContext = await loadSchemaContext({
  schemaPath: { cliProvidedPath: fileURLToPath(new URL('schema.prisma', folder)) },
  printLoadMessage: false
})
const registry = { 'prisma-client': { type: 'in-process', generator: new PrismaClientTsGenerator() } }
for (const generator of await getGenerators({ schemaContext, registry })) {
  await generator.generate()
  generator.stop()
}
