import t from 'tap'
import { LinkedMap, Node } from '../../lib/stores/memory/linked-map.js'

class Book extends Node {
  readonly size: number

  constructor(key: string, size: number) {
    super(key)
    this.size = size
  }
}

function shelfOf(...keys: string[]): { shelf: LinkedMap<Book>; books: Record<string, Book> } {
  const shelf = new LinkedMap<Book>()
  const books: Record<string, Book> = {}
  for (const key of keys) {
    const book = new Book(key, key.length)
    books[key] = book
    shelf.set(book)
  }
  return { shelf, books }
}

/** The keys that a walk shows. */
function walked(shelf: LinkedMap<Book>, count: number): string {
  let keys = ''
  shelf.scan(count, ({ key }) => {
    keys += key
  })
  return keys
}

t.test('a walk shows so many items, and the next one goes on where it has ended', async (t) => {
  const { shelf } = shelfOf('a', 'b', 'c', 'd', 'e')
  t.strictSame([walked(shelf, 2), walked(shelf, 2), walked(shelf, 2), walked(shelf, 2)], ['ab', 'cd', 'e', 'ab'])
})

t.test('what a walk would go on with may be removed meanwhile', async (t) => {
  const { shelf, books } = shelfOf('a', 'b', 'c', 'd')
  t.equal(walked(shelf, 1), 'a')
  shelf.remove(books.b as Book)
  t.equal(walked(shelf, 1), 'c')
  shelf.remove(books.a as Book)
  t.equal(walked(shelf, 5), 'd')
})

t.test('what a walk would go on with may be made the newest meanwhile', async (t) => {
  const { shelf, books } = shelfOf('a', 'b', 'c')
  t.equal(walked(shelf, 1), 'a')
  shelf.touch(books.b as Book)
  t.equal(walked(shelf, 5), 'cb')
})

t.test('what is shown may be removed while it is', async (t) => {
  const { shelf } = shelfOf('a', 'b', 'c')
  shelf.scan(2, (book) => shelf.remove(book))
  t.strictSame([shelf.length, shelf.oldest?.key, shelf.bytes], [1, 'c', 1])
})

t.test('the order is that of putting and renewing, and the sizes add up', async (t) => {
  const { shelf, books } = shelfOf('a', 'bb', 'ccc')
  t.equal(shelf.bytes, 6)
  shelf.touch(books.a as Book)
  t.equal(walked(shelf, 5), 'bbccca')
  shelf.set(new Book('bb', 10))
  t.strictSame([shelf.length, shelf.bytes], [3, 14])
  t.equal(walked(shelf, 5), 'cccabb')
  for (const key of ['ccc', 'a', 'bb']) {
    t.equal(shelf.oldest?.key, key)
    shelf.remove(shelf.get(key) as Book)
  }
  t.strictSame([shelf.length, shelf.bytes, shelf.oldest], [0, 0, null])
})
