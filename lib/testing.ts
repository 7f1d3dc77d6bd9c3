export type { TestClaim, TestRecord, TestReply, TestTombstone } from './testing/contents.js'
export { TestStore } from './testing/test-store.js'
