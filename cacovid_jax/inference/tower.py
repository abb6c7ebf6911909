"""The vision tower's programs: the only place that runs it for a clip."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cacovid_jax.models import video_llm
from cacovid_jax.parallel import mesh as mesh_lib

# Names of a clip's arrays beside those of `video_llm.SIGNALS`.
FEATURES, DEEP = "features", "deep"


class Tower:
  """The programs of a vision tower: features, and signals apart.

  `rows` is the number of clips that are encoded at once.
  """

  def __init__(self, model, params, mesh: Mesh | None):
    """Compiles nothing yet.

    Args:
      model: `VideoLLM`.
      params: of the model; those of its language model are not used.
      mesh: each device of its `data` axis encodes a clip; None is one at once.
    """
    self._model, self._mesh, self._programs = model, mesh, {}
    self.rows = 1 if mesh is None else mesh.shape["data"]
    # None where nothing is to be encoded.
    params = {k: v for k, v in (params or {}).items() if k != "language_model"}
    if mesh is not None:
      params = mesh_lib.put(params, mesh, mesh_lib.P())
    self._params = params

  def __call__(self, names: frozenset[str], inputs) -> list[dict[str, Any]]:
    """Returns {name: float32 array} of each of the clips' TowerInputs."""
    wanted = [()] if FEATURES in names else []
    if signals := video_llm.check_signals(names - {FEATURES}):
      wanted.append(signals)
    found = [{} for _ in inputs]
    for signals in wanted:
      for out, new in zip(found, self._run(signals, inputs), strict=True):
        # In float32 as on disk, so that a hit changes no type or bit.
        out |= {k: np.asarray(v, np.float32) for k, v in new.items()}
    return found

  def _run(self, signals, inputs) -> list[dict[str, jax.Array]]:
    if signals not in self._programs:
      self._programs[signals] = self._compile(signals)
    program = self._programs[signals]
    if self._mesh is None:
      out = [program(self._params, one) for one in inputs]
      return jax.block_until_ready(out)
    count = len(inputs)
    inputs = [*inputs, *[inputs[-1]] * (self.rows - count)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs)
    out = jax.device_get(program(self._params, stacked))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(count)]

  def _compile(self, signals):
    def encode(params, inputs):
      video = self._model.encode(params, inputs, signals=signals)
      # What is not returned is not run.
      if signals:
        return dict(video.signals)
      found = {FEATURES: video.features, DEEP: video.deep}
      return {k: v for k, v in found.items() if v is not None}

    if self._mesh is None:
      return jax.jit(encode)
    return mesh_lib.jit_rows(
      lambda params, inputs: jax.lax.map(
        lambda one: encode(params, one), inputs
      ),
      self._mesh,
    )
