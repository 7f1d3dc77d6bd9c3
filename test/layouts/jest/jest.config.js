module.exports = { testEnvironment: 'node', testSequencer: './in-order.js', cache: false }
