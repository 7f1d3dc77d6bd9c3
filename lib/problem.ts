import { STATUS_CODES } from 'node:http'
import type { Refusal } from './errors.js'

export const PROBLEM_TYPE = 'application/problem+json'

/** The error as a problem document (RFC 9457 §3), with the error's `code` as an extension member. */
export function problemOf({ code, message, statusCode }: Refusal, documentationUrl: string | null): string {
  return JSON.stringify({
    type: documentationUrl ?? 'about:blank',
    title: STATUS_CODES[statusCode],
    status: statusCode,
    detail: message,
    code
  })
}
