// A PNG of a screen, with a palette: what has few colours takes a third of the room.

import { deflateSync, inflateSync } from 'node:zlib'

const SIGNATURE = 8
const MOST_COLOURS = 256

/**
 * @param {Buffer} png of 8 bits for each colour, without transparency, as Chromium makes them
 * @returns {Buffer} the same picture, in its 256 most frequent colours
 */
export function smallPng(png) {
  const { width, height, pixels } = decode(png)
  const counts = new Map()
  for (const colour of pixels) counts.set(colour, (counts.get(colour) ?? 0) + 1)
  const byCount = [...counts].sort(([, a], [, b]) => b - a)
  const palette = byCount.slice(0, MOST_COLOURS).map(([colour]) => colour)
  const indices = new Map(byCount.map(([colour]) => [colour, nearest(palette, colour)]))

  // Each line begins with its filter: none.
  const lines = Buffer.alloc((width + 1) * height)
  pixels.forEach((colour, index) => {
    lines[index + 1 + Math.floor(index / width)] = indices.get(colour)
  })
  const header = Buffer.alloc(13)
  header.writeUInt32BE(width, 0)
  header.writeUInt32BE(height, 4)
  header.set([8, 3], 8)
  return Buffer.concat([
    png.subarray(0, SIGNATURE),
    chunk('IHDR', header),
    chunk('PLTE', Buffer.from(palette.flatMap(parts))),
    chunk('IDAT', deflateSync(lines, { level: 9 })),
    chunk('IEND', Buffer.alloc(0))
  ])
}

/** @param {number} colour */
const parts = (colour) => [colour >> 16, (colour >> 8) & 255, colour & 255]

/** @type {(palette: number[], colour: number) => number} */
function nearest(palette, colour) {
  const distances = palette.map((other) => {
    const [r, g, b] = parts(other).map((part, index) => part - parts(colour)[index])
    return r * r + g * g + b * b
  })
  return distances.indexOf(Math.min(...distances))
}

/** @param {Buffer} png */
function decode(png) {
  const data = []
  let [width, height] = [0, 0]
  for (let at = SIGNATURE; at < png.length; ) {
    const length = png.readUInt32BE(at)
    const type = png.toString('latin1', at + 4, at + 8)
    const content = png.subarray(at + 8, at + 8 + length)
    if (type === 'IHDR') {
      ;[width, height] = [content.readUInt32BE(0), content.readUInt32BE(4)]
      if (content[8] !== 8 || content[9] !== 2) throw new Error('only 8 bits of RGB are read')
    }
    if (type === 'IDAT') data.push(content)
    at += length + 12
  }
  const bytes = unfilter(inflateSync(Buffer.concat(data)), width * 3, height)
  const pixels = new Uint32Array(width * height)
  for (let index = 0; index < pixels.length; index++) pixels[index] = bytes.readUIntBE(index * 3, 3)
  return { width, height, pixels }
}

/** PNG (third edition) §9. @type {(filtered: Buffer, length: number, height: number) => Buffer} */
function unfilter(filtered, length, height) {
  const bytes = Buffer.alloc(length * height)
  for (let y = 0; y < height; y++) {
    const filter = filtered[y * (length + 1)]
    for (let x = 0; x < length; x++) {
      const at = y * length + x
      const left = x < 3 ? 0 : bytes[at - 3]
      const up = y === 0 ? 0 : bytes[at - length]
      const corner = x < 3 || y === 0 ? 0 : bytes[at - length - 3]
      const guess = [0, left, up, (left + up) >> 1, paeth(left, up, corner)][filter]
      bytes[at] = filtered[at + y + 1] + guess
    }
  }
  return bytes
}

/** @type {(left: number, up: number, corner: number) => number} */
function paeth(left, up, corner) {
  const [a, b, c] = [left, up, corner].map((one) => Math.abs(left + up - corner - one))
  if (a <= b && a <= c) return left
  return b <= c ? up : corner
}

/** @type {(type: string, content: Buffer) => Buffer} */
function chunk(type, content) {
  const body = Buffer.concat([Buffer.from(type, 'latin1'), content])
  const [length, check] = [Buffer.alloc(4), Buffer.alloc(4)]
  length.writeUInt32BE(content.length)
  check.writeUInt32BE(crc32(body))
  return Buffer.concat([length, body, check])
}

/** @param {Buffer} bytes */
function crc32(bytes) {
  let crc = ~0
  for (const byte of bytes) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1
  }
  return ~crc >>> 0
}
