const { default: Sequencer } = require('@jest/test-sequencer')

/** By name: a file without the package comes between two with it. */
module.exports = class InOrder extends Sequencer {
  sort(tests) {
    return [...tests].sort((a, b) => (a.path < b.path ? -1 : 1))
  }
}
