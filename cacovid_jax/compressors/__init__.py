"""Token compressors behind one interface: `names()` lists, `get()` builds.

A method is named `random`, with options `density_peaks?scope=video`, or lives
in a user's own file: `path/to/file.py:attribute?option=value`.
"""

from cacovid_jax.compressors.registry import get, names, oracles, parse

__all__ = ["get", "names", "oracles", "parse"]
