"""The compiled functions that an evaluation asks with.

Letters: B batch, L prompt tokens, N video tokens, D width, K kept tokens,
M generated tokens, P position rows, Q tokens of a question's text.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, in_llm
from cacovid_jax.models import generation, prompt_batch


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

  def __init__(self, checkpoint, grid, max_new_tokens: int):
    self.grid = grid
    self._model = checkpoint.model
    self._num_video = grid[0] * grid[1] * grid[2]
    self._num_layers = self._model.config.text.num_layers
    self._ending = dict(
      max_new_tokens=max_new_tokens,
      eos_ids=tuple(checkpoint.eos_ids),
      pad_id=checkpoint.pad_id,
    )
    self.embed = jax.jit(jax.vmap(self._model.embed_prompt, (None, 0, 0, 0)))
    self.vanilla = jax.jit(self._vanilla, static_argnames="want_attention")
    self.text = jax.jit(lambda batch: jax.vmap(_text)(batch.x, batch.text_rows))
    self.scores = jax.jit(self._scores, static_argnums=0)
    self.answer = jax.jit(self._answer)
    self._selects, self._insides = {}, {}

  @property
  def num_compiled(self) -> int:
    """Programs that have been compiled."""
    functions = [self.embed, self.vanilla, self.text, self.scores, self.answer]
    functions += [*self._selects.values(), *self._insides.values()]
    # What reads counts on the host is no program of its own.
    sizes = [getattr(f, "_cache_size", None) for f in functions]
    return sum(size() for size in sizes if size)

  def select(self, compressor: base.Compressor, ratio: float):
    """Returns f(features [B, N, D], text, aux, keys) -> `Selection` [B, ...].

    One program per compressor and ratio; its number of rows is the method's.
    """
    if (compressor, ratio) not in self._selects:
      self._selects[compressor, ratio] = self._select(compressor, ratio)
    return self._selects[compressor, ratio]

  def inside(self, compressor: in_llm.InLLM, ratio: float):
    """Returns f(params, batch, text, aux, keys) -> (ids, `in_llm.Trace`).

    One program per compressor and ratio, selection and answer in one.
    """
    if (compressor, ratio) not in self._insides:
      self._insides[compressor, ratio] = self._inside(compressor, ratio)
    return self._insides[compressor, ratio]

  def check(self, compressor: Any, ratio: float) -> None:
    """Refuses a budget that the method cannot meet."""
    if acts_inside(compressor):
      compressor.plan(self._num_layers, self._num_video, ratio)
    else:
      compressor.rows(self.grid, ratio)

  def minimum_ratio(self, compressor: Any) -> float | None:
    """Returns the lowest ratio that a method can; None where it is not told."""
    if not acts_inside(compressor):
      return None
    return compressor.minimum_ratio(self._num_layers, self._num_video)

  def _inside(self, compressor, ratio):
    def ask(params, batch: prompt_batch.PromptBatch, text, aux, keys):
      return in_llm.generate(
        self._model,
        params,
        compressor,
        batch,
        aux,
        grid=self.grid,
        ratio=ratio,
        text=text,
        rngs=keys,
        **self._ending,
      )

    # Some read on the host how many tokens go on.
    return ask if compressor.on_host else jax.jit(ask)

  def _select(self, compressor, ratio):
    num_keep = compressor.rows(self.grid, ratio)

    def one(features, text, aux, key):
      return compressor.compress(
        features,
        grid=self.grid,
        num_keep=num_keep,
        text=text,
        aux=aux,
        rng=key,
        ratio=ratio,
      )

    return jax.jit(jax.vmap(one))

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
    rows = prompt_batch.keep(
      prompt_batch.whole(batch), selection, num_video=self._num_video
    )
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


def acts_inside(compressor: Any) -> bool:
  """True for a method that drops tokens inside the language model."""
  return isinstance(compressor, in_llm.InLLM)


def _text(x, rows):
  """Returns float[Q, D], the rows of x float[L, D]; zeros for rows >= L."""
  inside = rows < x.shape[0]
  taken = jnp.take(x, rows, axis=0, mode="clip")
  return jnp.where(inside[:, None], taken, 0)
