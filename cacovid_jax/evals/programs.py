"""The compiled functions that an evaluation asks with.

Letters: B batch, L prompt tokens, N video tokens, D width, K kept tokens,
M generated tokens, P position rows, Q tokens of a question's text.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, layerwise
from cacovid_jax.models import generation, prompt_batch
from cacovid_jax.parallel import mesh as mesh_lib


class Vanilla(NamedTuple):
  """Answers to whole prompts: ids int32[B, M], attention float32[B, layers, N].

  Attention is None unless asked for.
  """

  ids: jax.Array
  attention: jax.Array | None


class Programs:
  """The compiled functions that ask about clips of one grid.

  Attributes:
    grid: (T, H, W) of the clips.
  """

  def __init__(self, checkpoint, grid, max_new_tokens: int, mesh=None):
    """Compiles nothing yet.

    Args:
      checkpoint: `models.checkpoints.Checkpoint`.
      grid: (T, H, W) of the clips.
      max_new_tokens: M.
      mesh: whose `data` axis shares the rows of a batch; None is one device.
    """
    self.grid = grid
    self._jit = functools.partial(mesh_lib.jit_rows, mesh=mesh)
    self._model = checkpoint.model
    self._num_video = grid[0] * grid[1] * grid[2]
    self._num_layers = self._model.config.text.num_layers
    self._ending = dict(
      max_new_tokens=max_new_tokens,
      eos_ids=tuple(checkpoint.eos_ids),
      pad_id=checkpoint.pad_id,
    )
    self.embed = self._jit(jax.vmap(self._model.embed_prompt, (None, 0, 0, 0)))
    self.text = self._jit(
      lambda batch: jax.vmap(_text)(batch.x, batch.text_rows), weights=()
    )
    self.answer = self._jit(self._answer)
    # By what else they depend on.
    self._vanillas, self._scorers, self._selects, self._insides = {}, {}, {}, {}

  @property
  def compiled(self) -> dict[str, int]:
    """How many programs have been compiled, by what they do."""
    by_kind = {
      "embed": [self.embed],
      "text": [self.text],
      "answer": [self.answer],
      "vanilla": self._vanillas.values(),
      "scores": self._scorers.values(),
      "select": self._selects.values(),
      "select and answer": self._insides.values(),
    }
    return {
      # What reads counts on the host is no program of its own.
      kind: sum(getattr(f, "_cache_size", lambda: 0)() for f in functions)
      for kind, functions in by_kind.items()
    }

  @property
  def num_compiled(self) -> int:
    """Programs that have been compiled."""
    return sum(self.compiled.values())

  def vanilla(
    self,
    params,
    batch: prompt_batch.PromptBatch,
    *,
    want_attention: bool = False,
  ) -> Vanilla:
    """Returns the answers to whole prompts."""
    if want_attention not in self._vanillas:
      self._vanillas[want_attention] = self._jit(
        functools.partial(self._vanilla, want_attention=want_attention)
      )
    return self._vanillas[want_attention](params, batch)

  def scores(self, module, params, batch: prompt_batch.PromptBatch):
    """Returns the Scores of a policy module with its parameters."""
    if module not in self._scorers:
      self._scorers[module] = self._jit(functools.partial(self._scores, module))
    return self._scorers[module](params, batch)

  def select(self, compressor: base.Compressor, ratio: float):
    """Returns f(`CompressorInputs`) -> `Selection`, both with leading axis B.

    One program per compressor and ratio; its number of rows is the method's.
    """
    if (compressor, ratio) not in self._selects:
      select = functools.partial(
        compressor.select_batch,
        num_keep=compressor.rows(self.grid, ratio),
        ratio=ratio,
      )
      # What never sees the question is run for one clip at a time.
      jit = self._jit if compressor.sees_question else jax.jit
      self._selects[compressor, ratio] = jit(
        lambda params, inputs: select(inputs, params=params)
      )
    program = self._selects[compressor, ratio]
    return lambda inputs: program(compressor.load(), inputs)

  def select_and_answer(self, compressor: base.Compressor, ratio: float):
    """Returns f(params, batch, inputs) -> (ids, `base.SelectionTrace`).

    One program per compressor and ratio, for those that choose while the
    language model reads.
    """
    if (compressor, ratio) not in self._insides:
      self._insides[compressor, ratio] = self._inside(compressor, ratio)
    program = self._insides[compressor, ratio]
    return lambda params, batch, inputs: program(
      params, batch, inputs, compressor.load()
    )

  def check(self, compressor: base.Compressor, ratio: float) -> None:
    """Refuses a budget that the method cannot meet."""
    compressor.rows_per_layer(self._num_layers, self.grid, ratio)

  def minimum_ratio(self, compressor: base.Compressor) -> float | None:
    """Returns the lowest ratio that a method can; None where it is not told."""
    return compressor.minimum_ratio(self._num_layers, self._num_video)

  def _inside(self, compressor, ratio):
    def ask(params, batch: prompt_batch.PromptBatch, inputs, own_params):
      return layerwise.generate(
        self._model,
        params,
        compressor,
        prompt_batch.whole(batch),
        inputs,
        batch.next_position,
        ratio=ratio,
        own_params=own_params,
        **self._ending,
      )

    # Some read on the host how many tokens go on.
    return ask if compressor.on_host else self._jit(ask, weights=(0, 3))

  def _vanilla(
    self, params, batch: prompt_batch.PromptBatch, *, want_attention: bool
  ) -> Vanilla:
    logits, cache, out = self._model.prefill(
      params,
      batch.x,
      batch.positions,
      batch.lengths,
      cache_length=batch.x.shape[1] + self._ending["max_new_tokens"] - 1,
      deep=batch.deep,
      video_rows=batch.video_rows,
      want_attention=want_attention,
    )
    ids = generation.extend(
      self._model,
      params,
      logits,
      cache,
      batch.next_position,
      num_position_rows=batch.positions.shape[1],
      **self._ending,
    )
    if not want_attention:
      return Vanilla(ids, None)
    # float32[layers, B, L] -> [B, layers, N].
    paid = jax.vmap(prompt_batch.read_video, (0, None), 1)
    rows = paid(out["last_query_attention"], batch.video_rows)
    return Vanilla(ids, rows)

  def _scores(self, module, params, batch: prompt_batch.PromptBatch):
    def one(x, positions, length, video_rows):
      return module.apply(
        {"params": params}, x, positions, video_rows, self.grid, length
      )

    return jax.vmap(one)(
      batch.x, batch.positions, batch.lengths, batch.video_rows
    )

  def _answer(
    self, params, batch: prompt_batch.PromptBatch, selection: base.Selection
  ):
    rows = prompt_batch.whole(batch)
    rows = prompt_batch.keep(rows, selection, num_video=self._num_video)
    # Kept tokens keep their positions, and the answer goes on where that of
    # the whole prompt would.
    return generation.greedy(
      self._model,
      params,
      rows.x,
      rows.positions,
      rows.lengths,
      batch.next_position,
      deep=rows.deep,
      video_rows=rows.video_rows,
      **self._ending,
    )


def _text(x, rows):
  """Returns float[Q, D], the rows of x float[L, D]; zeros for rows >= L."""
  inside = rows < x.shape[0]
  taken = jnp.take(x, rows, axis=0, mode="clip")
  return jnp.where(inside[:, None], taken, 0)
