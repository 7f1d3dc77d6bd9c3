// In a project of your own: import { EncryptedStore, … } from 'fastify-idempotency'
import { EncryptedStore, type IdempotencyStore, LocalCache } from '../index.js'

/**
 * Replies are encrypted before they get to the store, and those of the last seconds are replayed without asking it:
 *
 *     store: encrypted(new RedisStore(app.redis), process.env.IDEMPOTENCY_SECRETS)
 *
 * @param secrets One or more, with commas between them: `openssl rand -base64 32` makes one. The first encrypts. To rotate, put
 * the new one at the end and deploy; put it in front and deploy; leave out the old one when the longest `ttl` is over.
 */
export function encrypted(store: IdempotencyStore, secrets: string | undefined): IdempotencyStore {
  if (!secrets) throw new Error('IDEMPOTENCY_SECRETS is not set')
  // The cache is in front, so that it keeps what is decrypted already: in this process, where replies are in clear anyway.
  return new LocalCache(new EncryptedStore(store, { keys: secrets.split(',') }))
}
