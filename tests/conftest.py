"""Shared set-up of the test suite."""

import sys

from absl import flags

# absl test cases read flags before pytest has parsed any.
flags.FLAGS(sys.argv[:1])
