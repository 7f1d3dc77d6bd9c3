/* The fields and files of a multipart body, for its key and its fingerprint. */

/** A part of @fastify/multipart with `attachFieldsToBody: true`. */
interface Part {
  fieldname?: unknown
  /** The fields of the whole form, this one among them. */
  fields?: Record<string, unknown> | null
  value?: unknown
  filename?: unknown
  mimetype?: unknown
  file?: { bytesRead?: number }
  toBuffer?: unknown
}

/**
 * Is it the field of a form, and not what a client's JSON makes look like one? A real one is part of its own `fields`: no
 * JSON can say that.
 */
export function isField(part: unknown): part is { value: unknown } {
  if (typeof part !== 'object' || part === null) return false
  const { fields, fieldname } = part as Part
  if (typeof fieldname !== 'string' || typeof fields !== 'object' || fields === null) return false
  if (!('value' in part) || isFilePart(part) || !Object.hasOwn(fields, fieldname)) return false
  return [fields[fieldname]].flat().includes(part)
}

/** Is it a file of a form? No JSON has functions. */
function isFilePart(part: unknown): boolean {
  return typeof (part as Part | null)?.toBuffer === 'function' && !ArrayBuffer.isView(part)
}

/**
 * The fields and files of a form by name: `null` where somebody has read and dropped a file, so that its content is not known.
 */
export async function formOf(body: object): Promise<Record<string, unknown> | null> {
  const form: Record<string, unknown> = Object.create(null)
  try {
    for (const [name, value] of Object.entries(body)) {
      if (!Array.isArray(value)) {
        form[name] = await contentOf(value)
        continue
      }
      const parts: unknown[] = []
      for (const part of value) parts.push(await contentOf(part))
      form[name] = parts
    }
  } catch {
    return null
  }
  return form
}

async function contentOf(part: unknown): Promise<unknown> {
  if (isField(part)) return part.value
  if (!isFilePart(part)) return part
  const { filename, mimetype, file, toBuffer } = part as Part & { toBuffer: () => Promise<Buffer> }
  const content = await toBuffer.call(part)
  if (content.length === 0 && file?.bytesRead) throw new Error('The file was read by others')
  return new FileContent(filename, mimetype, content)
}

class FileContent {
  constructor(
    readonly filename: unknown,
    readonly mimetype: unknown,
    readonly content: Uint8Array
  ) {}
}
