import { Body, Controller, Get, ParseIntPipe, Post, Req } from '@nestjs/common'
import type { FastifyRequest } from 'fastify'
import { ChargesService } from './charges.service'
import { Idempotent } from './idempotent.decorator'

@Controller('charges')
export class ChargesController {
  constructor(private readonly charges: ChargesService) {}

  @Idempotent({ required: true })
  @Post()
  create(@Req() request: FastifyRequest, @Body('amount', ParseIntPipe) amount: number) {
    return this.charges.create(request, amount)
  }

  @Get()
  count() {
    return this.charges.count
  }
}
