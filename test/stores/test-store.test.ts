import t from 'tap'
import { TestStore } from '../../lib/testing.js'
import { conforms } from '../support/store-fixtures.js'

conforms(t, 'a TestStore keeps every promise of a store', () => new TestStore())
