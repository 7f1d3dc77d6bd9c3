/*
 * What a database has to do for a `CompareAndSetStore`: five statements on one table, each of them atomic by itself.
 * Which of them is due is decided elsewhere, and stays right because a row is replaced only as long as it is the one that
 * was looked at.
 */

/**
 * Where a key is. `running`: a claim, whose lease may have lapsed. `ended` and `abandoned`: a claim that was given back, after
 * its handler had run or as it was found. `completed`: a record. `released`: free, but for the memory of who released it.
 */
export type RowState = 'running' | 'ended' | 'abandoned' | 'completed' | 'released'

/** What a row holds beside its key, and how long that counts. All times are the database's, in milliseconds since the epoch. */
export interface Content {
  readonly state: RowState
  /** The owner's, or that of the last owner. */
  readonly token: string
  /** A claim or a record as bytes; none of a key that is free. */
  readonly value: Buffer
  readonly leaseEnd: number
  /** When the row no longer counts; `null` for never. */
  readonly expiresAt: number | null
}

/** A row as it was found. */
export interface Row extends Content {
  /** Changes whenever the row does, and is never the same again. */
  readonly revision: string
  /** When it was looked at. */
  readonly now: number
}

/** What a row is to hold from now on: `now` is what the database's clock says as it writes. */
export type Lasting = Pick<Content, 'token' | 'value'> & {
  readonly leaseMs: number
  /** `null` for ever. */
  readonly keepMs: number | null
}

/** Some rows, with their keys. */
export interface RowPage {
  readonly rows: readonly (Row & { readonly key: string })[]
  /** After which key the next page begins; `null` after the last page. */
  readonly last: string | null
}

/** A table with a row for each key. Rejections tell nothing of what is stored. */
export interface CasDriver {
  /** A running claim, where there is no row of the key; `false` where there is one. */
  insert(key: string, revision: string, claim: Lasting): Promise<boolean>
  find(key: string): Promise<Row | null>
  /** Puts the content in the place of the row of that revision; `false` where there is none. */
  replace(key: string, found: string, revision: string, content: Content): Promise<boolean>
  /** Puts a record in the place of the running claim of the token, whatever its revision, if it still counts. */
  complete(key: string, revision: string, record: Lasting): Promise<boolean>
  /** Deletes the row of that revision; `false` where there is none. */
  remove(key: string, found: string): Promise<boolean>
  /** Which of the keys have a running claim under a lease that has not lapsed. */
  running(keys: readonly string[]): Promise<readonly string[]>
  /**
   * Some rows in the order of their keys: of those that are in one of the states, all; perhaps others.
   * @param after The key after which they begin; `null` for the first page.
   * @param recordBytes How much of the value of a record is wanted. Claims are whole.
   */
  page(after: string | null, states: readonly RowState[], recordBytes: number): Promise<RowPage>
  /** Deletes some of what no longer counts; `true` when there may be more. */
  sweep(): Promise<boolean>
  /** Was that why a record was not taken? Left out where the database takes whatever can be encoded. */
  isTooLarge?(value: Buffer, error: unknown): Promise<boolean>
  /** What a claim is told of an error: a database without room is there, and refuses. */
  claimFailure(error: unknown): unknown
}
