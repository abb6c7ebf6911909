"""Token compressors behind one interface: `names()` lists, `get()` builds.

A method is named `random`, with options `density_peaks?scope=video`, or lives
in a user's own file: `path/to/file.py:attribute?option=value`. Every method
takes `exact_budget=False` to round budgets as its own publication does, and
`get(name).requirements` says what it cannot do without.

Axes in all files: B batch, N video tokens, D width, K kept tokens or rows, T
frames, H W token grid, P = H * W tokens of a frame.
"""

from cacovid_jax.compressors.registry import get, names, oracles, parse

__all__ = ["get", "names", "oracles", "parse"]
