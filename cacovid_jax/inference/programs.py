"""The functions that ask a model, pure and compiled.

A clip's grid is data inside its bucket for everything but a compressor's
choice: that is made for the exact grid, and padded to the bucket's rows.

Letters: B batch, G selections of one prompt, L prompt rows, N video tokens, D
width, K kept and M generated tokens, Q of a question's text, V vocabulary.
"""

import collections
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import base, layerwise
from cacovid_jax.models import generation, layers, prompt_batch, token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import network

# Programs that read prompts.
_PREFILLS = ("answer", "text only", "vanilla", "select and answer")


class Vanilla(NamedTuple):
  """ids int32[B, M] from whole prompts; attention float32[B, layers, N]."""

  ids: jax.Array
  attention: jax.Array | None = None


def answer_rows(
  model, params, prompts, index, num_valid, *, max_new_tokens, eos_ids, pad_id,
  decided=None, earlier=None,
):  # fmt: skip
  """Returns (ids int32[B, G, M], logits float32[B, G, V] or None).

  Greedy answers from G selections of each video. Rows are gathered from the one
  embedded prompt and keep its positions; text goes on where the whole prompt
  ends.

  Args:
    model: `models.video_llm.VideoLLM`.
    params: its weights.
    prompts: B whole prompts.
    index: int32[B, G, K] kept tokens, ascending over the first `num_valid`.
    num_valid: int32[B].
    max_new_tokens: M; with 1 nothing is decoded, and the logits come too.
    eos_ids: ids that end an answer.
    pad_id: filler behind the end.
    decided: where an answer may stop before its end, see `generation.extend`.
    earlier: of the text in front of each video, read once, see `read_text`.
  """
  batch, count = index.shape[:2]
  state = read_rows(
    model, params, prompts, index, num_valid, room=max_new_tokens - 1,
    earlier=earlier,
  )  # fmt: skip
  ids = generation.extend(
    model, params, *state, pad_id=pad_id, max_new_tokens=max_new_tokens,
    eos_ids=tuple(eos_ids), decided=decided,
  )  # fmt: skip
  logits = state[0].reshape(batch, count, -1) if max_new_tokens == 1 else None
  return ids.reshape(batch, count, -1), logits


def read_rows(
  model, params, prompts, index, num_valid, *, room, earlier=None, replaced=None
):
  """Returns (logits, cache, next positions) of B G prompts, pruned and read.

  What `generation.extend` goes on from. `room` is for that many more rows;
  `replaced` the selection [B, ...] of `index` where a method may have changed
  the rows that it keeps (merged tokens), with G = 1. The other arguments are
  those of `answer_rows`.
  """
  prompts = prompts._replace(features=None, ids=None, text_rows=None)
  of_video = jax.vmap(prompt_batch.prune, (None, 0, None))
  _, pruned = jax.vmap(of_video)(prompts, index, num_valid)
  rows = math.prod(index.shape[:2])
  pruned = jax.tree.map(lambda a: a.reshape(rows, *a.shape[2:]), pruned)
  if replaced is not None:
    pruned = prompt_batch.write_selection(pruned, replaced)
  logits, cache, _ = _prefill(model, params, pruned, room, earlier)
  return logits, cache, pruned.next_position


class Programs:
  """The compiled functions of one checkpoint; a grid may be a `TokenGrid`.

  Each compiles once for every bucket of grids and length of text; those that
  choose tokens once for every grid.

  Attributes:
    embed: (params, ids, features, video rows) -> float[B, L, D].
    text: (batch) -> float[B, Q, D] of the questions, padded by zeros.
    answer: (params, batch, `Selection` [B, ...]) -> ids int32[B, M].
    answer_text: (params, ids int32[B, L], lengths) -> ids, without a video.
    read: (params, batch, `Selection` or None for all, room) -> (logits, cache)
      with static room for more rows.
    score: `generation.score` of this model.
  """

  def __init__(self, checkpoint, max_new_tokens: int, mesh=None):
    """Compiles nothing yet; the mesh's `data` axis is to share a batch."""
    self._mesh, self._made = mesh, collections.defaultdict(dict)
    model = self._model = checkpoint.model
    self._ending = dict(
      max_new_tokens=max_new_tokens,
      eos_ids=tuple(checkpoint.eos_ids),
      pad_id=checkpoint.pad_id,
    )
    self._room = max_new_tokens - 1
    options = mesh_lib.compiler_options("prefill", jax.default_backend())
    self._decoding_differs = bool(self._room and options)  # It has none.
    embed = jax.vmap(model.embed_prompt, (None, 0, 0, 0))
    self.embed = self._once("embed", (), embed)
    # Programs are counted by function: each of this class has its own.
    read = prompt_batch.read_video
    self.text = self._once(
      "text", (), lambda batch: read(batch.x, batch.text_rows), weights=()
    )
    self.answer = self._asking("answer", (), self._read_selected)
    self.answer_text = self._once("text only", (), self._answer_text)
    self.read = mesh_lib.jit(self._read, "prefill", static_argnums=3)
    self.score = jax.jit(functools.partial(generation.score, model))
    self._made["likelihood"] |= {"read": self.read, "score": self.score}

  def _once(self, kind: str, key, function, *, rows: bool = True, **options):
    """Returns the compiled function of a key, made once; not all share rows."""
    if key not in (made := self._made[kind]):
      mesh = self._mesh if rows else None
      compiled_as = "prefill" if kind in _PREFILLS else ""
      made[key] = mesh_lib.jit_rows(function, mesh, compiled_as, **options)
    return made[key]

  def _asking(self, kind: str, key, read, wrap=lambda ids, _: ids):
    """Returns f(params, *given) -> wrap(ids, rest): reads, then answers.

    `read` gives ((logits, cache, next positions), rest). On one GPU, reading
    and answering are two programs, because their best options differ.
    """

    def ask(params, *given):
      state, rest = read(params, *given)
      return wrap(self._extend(params, *state), rest)

    alone = self._mesh is None or self._mesh.size == 1
    if not (alone and self._decoding_differs):
      return self._once(kind, key, ask)
    read_first = self._once(kind, key, read)

    def ask_twice(params, *given):
      state, rest = read_first(params, *given)
      decode = self._once("decode", (), self._extend)
      return wrap(decode(params, *state), rest)

    return ask_twice

  def _extend(self, params, logits, cache, following):
    return generation.extend(
      self._model, params, logits, cache, following, **self._ending
    )

  @property
  def compiled(self) -> dict[str, int]:
    """How many programs have been compiled, by what they do."""
    return {
      # What reads counts on the host is no program of its own.
      kind: sum(getattr(f, "_cache_size", lambda: 0)() for f in made.values())
      for kind, made in self._made.items()
    }

  @property
  def num_compiled(self) -> int:
    """How many programs have been compiled in all."""
    return sum(self.compiled.values())

  def vanilla(self, params, batch, *, want_attention: bool = False) -> Vanilla:
    """Returns the answers to whole prompts, and attention if wanted."""
    read = functools.partial(self._read_all, want_attention=want_attention)
    return self._asking("vanilla", want_attention, read, Vanilla)(params, batch)

  def scores(self, module, params, batch, grid, ratio: float):
    """Returns the Scores of a policy module for a `PromptBatch`.

    The ratio is data, and given to modules alone that read it.
    """
    score = functools.partial(_scores, module)
    program = self._once("scores", module, score, weights=(0, 2, 3))
    ratio = np.float32(ratio) if network.reads_ratio(module) else None
    return program(params, batch, token_grid.TokenGrid.of(grid), ratio)

  def select(self, compressor: base.Compressor, ratio: float, grid):
    """Returns f(`CompressorInputs`) -> `Selection`, both with leading axis B.

    Its rows are those of the grid's bucket, or of the smallest size that holds
    what is kept, if there are several; `inputs` are of the exact grid.
    """
    grid = token_grid.TokenGrid.of(grid)
    num_keep = compressor.rows(_shape(grid), ratio)

    def select(params, inputs):
      given = dict(num_keep=num_keep, ratio=ratio, params=params)
      return _padded(compressor.select_batch(inputs, **given), ratio, grid)

    key = compressor, ratio, _shape(grid), grid.bucket
    # What never sees the question is run for one clip at a time.
    rows = compressor.sees_question
    program = self._once("select", key, select, rows=rows)
    sizes = compressor.row_sizes(_shape(grid), ratio)
    return lambda inputs: _cut(program(compressor.load(), inputs), sizes)

  def select_and_answer(self, compressor, ratio: float, grid, *, room=None):
    """Returns f(params, batch, inputs) -> (ids, `base.SelectionTrace`).

    For methods that choose while the language model reads; one program for
    each, each ratio and each grid. With `room`, it returns what `read` does.
    """
    key = compressor, ratio, _shape(grid), room
    num_video = math.prod(_shape(grid))

    def ask(params, batch, inputs, own_params):
      batch = prompt_batch.crop(batch, num_video)
      rows = prompt_batch.whole(batch)
      given = dict(ratio=ratio, own_params=own_params)
      if room is not None:
        return compressor.prefill(
          self._model, params, rows, inputs, new_rows=room, **given
        )[:2]
      return layerwise.generate(
        self._model, params, compressor, rows, inputs, batch.next_position,
        **given, **self._ending,
      )  # fmt: skip

    program = ask  # Some read on the host how many tokens go on.
    if not compressor.on_host:
      # A cache does not lead with the batch.
      options = {"weights": (0, 3), "rows": room is None}
      asked = ask if room is None else mesh_lib.whole(ask, self._mesh)
      program = self._once("select and answer", key, asked, **options)
    return lambda *arguments: program(*arguments, compressor.load())

  def _read_all(self, params, batch, *, want_attention: bool):
    logits, cache, out = _prefill(
      self._model, params, batch, self._room, want_attention=want_attention
    )
    state = logits, cache, batch.next_position
    if not want_attention:
      return state, None
    # float32[layers, B, L] -> [B, layers, N].
    paid = jax.vmap(prompt_batch.read_video, (0, None), 1)
    return state, paid(out["last_query_attention"], batch.video_rows)

  def _read_selected(self, params, batch, selection: base.Selection):
    state = read_rows(
      self._model, params, batch, selection.index[:, None],
      selection.mask.sum(axis=1, dtype=jnp.int32), room=self._room,
      replaced=selection,
    )  # fmt: skip
    return state, None

  def _answer_text(self, params, ids, lengths):
    # Without a video, rows of time, height and width count on alike.
    shape = len(ids), self._model.num_position_rows, ids.shape[1]
    count = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return generation.greedy(
      self._model, params, self._model.embed_text(params, ids),
      jnp.broadcast_to(count, shape), lengths, lengths, **self._ending,
    )  # fmt: skip

  def _read(self, params, batch, selection, room):
    def read(params, rows, selection):
      num_video = rows.video_rows.shape[1]
      if selection is not None:
        rows = prompt_batch.whole(rows)
        rows = prompt_batch.keep(rows, selection, num_video=num_video)
      return _prefill(self._model, params, rows, room)[:2]

    return mesh_lib.whole(read, self._mesh)(params, batch, selection)


def read_text(model, params, prompts, count: int):
  """Returns keys and values float[layers, B, count, K, H] of first rows.

  Of B whole prompts, whose first `count` rows stand in front of the video, so
  that they are the same whatever is kept of it.
  """
  lengths = jnp.full(len(prompts.x), count, jnp.int32)
  given = prompts.x[:, :count], prompts.positions[:, :, :count], lengths
  _, cache, _ = model.prefill(params, *given, cache_length=count)
  return layers.joined(cache.keys), layers.joined(cache.values)


def _prefill(model, params, rows, room: int, earlier=None, **options):
  """Returns (logits, cache, out) of prompts, with room for more rows."""
  length = rows.x.shape[1] + room
  if earlier is not None:
    rows = prompt_batch.behind(rows, earlier[0].shape[2])
  return model.prefill(
    params, rows.x, rows.positions, rows.lengths, cache_length=length,
    earlier=earlier, deep=rows.deep, video_rows=rows.video_rows, **options,
  )  # fmt: skip


def _shape(grid) -> tuple[int, int, int]:
  return tuple(map(int, token_grid.TokenGrid.of(grid).shape))


def _scores(module, params, batch: prompt_batch.PromptBatch, grid, ratio):
  return jax.vmap(
    lambda prompt: network.score(module, params, prompt, grid, ratio)
  )(batch)


def _cut(selection: base.Selection, sizes):
  """Returns selections with the fewest rows, of these sizes, that hold them."""
  if len(sizes) == 1:
    return selection
  most = int(selection.mask.sum(axis=1).max())
  rows = next(size for size in sizes if size >= most)
  parts = selection._replace(assign=None, deep=None)
  parts = jax.tree.map(lambda leaf: leaf[:, :rows], parts)
  deep = None if selection.deep is None else selection.deep[:, :, :rows]
  return parts._replace(assign=selection.assign, deep=deep)


def _padded(selection: base.Selection, ratio: float, grid):
  """Returns a selection with the rows of the bucket, which share a program."""
  if grid.full:
    return selection
  tokens, num_video = grid.bucket.tokens, int(grid.num_tokens)
  num_keep = selection.index.shape[1]
  more = max(int(ratio * tokens), num_keep) - num_keep

  def pad(x, count, value, axis=1):
    width = [(0, 0)] * x.ndim
    width[axis] = 0, count
    return jnp.pad(x, width, constant_values=value)

  return base.Selection(
    features=pad(selection.features, more, 0),
    index=pad(selection.index, more, num_video),
    mask=pad(selection.mask, more, False),
    mass=pad(selection.mass, more, 0),
    assign=pad(selection.assign, tokens - num_video, -1),
    deep=None if selection.deep is None else pad(selection.deep, more, 0, 2),
  )
