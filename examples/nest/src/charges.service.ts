import { Injectable } from '@nestjs/common'
import type { FastifyRequest } from 'fastify'

export interface Charge {
  id: string
  account: string
  amount: number
}

@Injectable()
export class ChargesService {
  /** How many charges were made. */
  count = 0

  async create({ account, idempotency }: FastifyRequest, amount: number): Promise<Charge> {
    if (idempotency === null) throw new Error('Charges are made with a key only')
    // What is made is not made again by an attempt that comes after a crash; should it be, it has the same id.
    return idempotency.step('charge', async ({ key }) => {
      this.count++
      return { id: `ch_${key}`, account, amount }
    })
  }
}
