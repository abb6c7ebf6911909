"""A small base model on several questions behind one video.

Axes: B clips, T frames, N video tokens, Q questions of a clip, A tokens of a
question with its answer, K kept video tokens, L of a whole prompt, H of its
head, R of a pruned head, P rows of positions, S feature maps, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import processors, qwen2


class Heads(NamedTuple):
  """Z ways to begin a prompt, up to the questions; clips differ in their text.

  The shorter ones are padded to H rows on the right.
  """

  ids: Any  # int32[Z, H], 0 below the video.
  positions: Any  # int32[Z, P, H].
  video_rows: Any  # int32[Z, N].
  length: Any  # int32[Z].
  following: Any  # int32[Z], the position behind.
  text_rows: Any  # int32[Z, H - N], all others, padding among them.


def heads_of(model, tokenizer, grid, seconds) -> Heads:
  """Returns the heads of a model's own prompts about a video of a grid.

  One for each entry of seconds, as of `TowerInputs`.
  """
  found = []
  for told in seconds:
    prompt = model.encode_prompt(tokenizer, "", grid, told)
    # Behind the last token: a newline, or the mark that ends a frame.
    ids = prompt.ids[: prompt.video_rows[-1] + 2]
    inputs = processors.TowerInputs(None, grid, told)
    found.append((ids, prompt.video_rows, *model.positions(ids, inputs)))
  rows = max(len(ids) for ids, *_ in found)
  if len(found) > 1:  # cuDNN differentiates a masked map of even sides only.
    rows += rows % 2

  def padded(x):
    return np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, rows - x.shape[-1])])

  heads = [
    Heads(
      padded(ids), padded(positions), video_rows, len(ids), following,
      np.setdiff1d(np.arange(rows), video_rows),
    )
    for ids, video_rows, positions, following in found
  ]  # fmt: skip
  return Heads(*(np.int32(np.stack(part)) for part in zip(*heads, strict=True)))


class TowerOutput(NamedTuple):
  """What the tower gives of B clips."""

  features: jax.Array  # float[B, N, D].
  deep: jax.Array | None = None  # float[B, S, N, D], see `VideoFeatures.deep`.


@dataclasses.dataclass(frozen=True, eq=False)
class PackedPrompts:
  """Layout: a head with N video tokens, and questions that go on from it."""

  model: Any  # A `models.video_llm.VideoLLM`.
  heads: Heads
  # Of float[F, h, w, 3] frames of one clip to its `TowerInputs`.
  arrange: Callable[[Any], Any]

  @property
  def num_video(self) -> int:
    return self.heads.video_rows.shape[1]

  @property
  def text_start(self) -> int:
    return self.heads.ids.shape[1]

  def chosen(self, which, batch: int) -> Heads:
    """Returns the heads [B, ...] of clips; `which` is int[B] of Z, or None."""
    which = jnp.zeros(batch, jnp.int32) if which is None else which
    return jax.tree.map(lambda x: jnp.asarray(x)[which], self.heads)

  def seen(self, head) -> jax.Array | None:
    """Returns bool[B, 1, H], rows that are there; None if all always are."""
    if (self.heads.length == self.text_start).all():
      return None
    return jnp.arange(self.text_start) < head.length[:, None, None]

  def question_mask(self, head, length: int) -> jax.Array:
    """Returns bool[B or 1, A, H + A]: the head, and a question up to itself."""
    own = jnp.tril(jnp.ones((1, length, length), bool))
    seen = self.seen(head)
    seen = jnp.ones((1, 1, self.text_start), bool) if seen is None else seen
    seen, own = (
      jnp.broadcast_to(x, (len(seen), length, x.shape[-1])) for x in (seen, own)
    )
    return jnp.concatenate([seen, own], axis=-1)

  def encode(self, params, pixels) -> TowerOutput:
    """Returns what the tower gives of clips float32[B, F, h, w, 3]."""

    def one(pixels):
      inputs = self.model.tower_inputs(self.arrange(pixels))
      video = self.model.encode(params, inputs)
      return TowerOutput(video.features, video.deep)

    return jax.vmap(one)(pixels)

  def _embed(self, params, features, head, ids):
    """Returns float[B, L, D], text int32[B, any] behind the head."""
    embed = jax.vmap(self.model.embed_prompt, (None, 0, 0, 0))
    rows = jnp.concatenate([head.ids, ids], axis=1)
    return embed(params, rows, features, head.video_rows)

  def full_logits(self, *args, **kwargs):
    """Returns float32[B, Q, A, V]; arguments are those of `full_hidden`."""
    return self.model.logits(args[0], self.full_hidden(*args, **kwargs)[0])

  def full_hidden(
    self, params, video: TowerOutput, ids, which=None, want_cache=False
  ):
    """Returns (hidden float[B, Q, A, D], out) of ids int32[B, Q, A].

    About whole videos: a head is read once, and each question beside it; they
    see no other. `out` is as of `model.forward`, of B Q prompts.
    """
    batch, num_questions, length = ids.shape
    head = self.chosen(which, batch)
    x = self._embed(params, video.features, head, ids[:, 0, :0])
    # Causal: what pads a head comes last, and no row that is there sees it.
    _, out = self.model.forward(
      params, x, head.positions, want_cache=True,
      **_deep(video.deep, head.video_rows),
    )  # fmt: skip

    def each(x):
      return jnp.repeat(x, num_questions, axis=0)

    mask = self.question_mask(head, length)
    positions = _with_text(head, head.positions[..., :0], np.arange(length))
    hidden, out = self.model.forward(
      params, self.model.embed_text(params, ids.reshape(-1, length)),
      each(positions), mask=mask if len(mask) == 1 else each(mask),
      causal=False, earlier=(out["keys"], out["values"]), want_cache=want_cache,
    )  # fmt: skip
    return hidden.reshape(batch, num_questions, length, -1), out

  def pruned_logits(self, *args, **kwargs):
    """Returns float32[B, Q, A, V]; arguments are those of `pruned_hidden`."""
    return self.model.logits(args[0], self.pruned_hidden(*args, **kwargs)[0])

  def pruned_hidden(
    self, params, video: TowerOutput, ids, index, valid, merged=None,
    which=None, want_cache=False,
  ):  # fmt: skip
    """Returns (hidden float[B, Q, A, D], out) of each question's kept tokens.

    At original positions, int32[B, Q, K], ascending where valid bool[B, Q, K]
    is True. By share `merged` float32[B, Q], a kept token becomes the mean of
    the tokens that are most alike to it. `out` is as of `model.forward`, of B Q
    prompts with a head each.
    """
    batch, num_questions, length = ids.shape
    head, start = self.chosen(which, batch), self.video_start
    rows, visible = self._pruned_rows(head, index, valid)
    # [B, H, D]
    whole = self._embed(params, video.features, head, ids[:, 0, :0])
    seen = jax.vmap(lambda w, r: w[r])(whole, rows)  # [B, Q, R, D]
    kept, deep = np.s_[:, :, start : start + index.shape[-1]], video.deep
    if deep is not None:  # [B, Q, S, K, D]
      deep = jnp.moveaxis(jax.vmap(lambda d, i: d[:, i])(deep, index), 1, 2)
    if merged is not None:
      mean = _cluster_means(video.features, index, valid)
      share = merged[..., None, None]
      own = jax.vmap(lambda w, r: w[r])(whole, head.video_rows)
      seen = seen.at[kept].set(_between(seen[kept], mean(own), share))
      if deep is not None:
        maps = [mean(one) for one in jnp.unstack(video.deep, axis=1)]
        deep = _between(deep, jnp.stack(maps, axis=2), share[..., None])
    x = jnp.concatenate([seen, self.model.embed_text(params, ids)], axis=2)
    positions = jax.vmap(lambda p, r: jnp.moveaxis(p[:, r], 0, 1))
    positions = positions(head.positions, rows)  # [B, Q, P, R]
    positions = _with_text(head, positions, np.arange(length))
    text = self.text_start + np.arange(length)
    rows = jnp.concatenate([rows, _like(text, rows)], axis=-1)
    visible = jnp.pad(visible, [(0, 0), (0, 0), (0, length)], constant_values=1)
    mask = (rows[..., None] >= rows[..., None, :]) & visible[..., None, :]
    x, positions, mask, deep = jax.tree.map(
      lambda a: a.reshape(-1, *a.shape[2:]), (x, positions, mask, deep)
    )
    places = jnp.broadcast_to(
      start + jnp.arange(index.shape[-1]), (len(x), index.shape[-1])
    )
    hidden, out = self.model.forward(
      params, x, positions, mask=mask, causal=False, want_cache=want_cache,
      **_deep(deep, places),
    )  # fmt: skip
    return hidden[:, -length:].reshape(batch, num_questions, length, -1), out

  @property
  def video_start(self) -> int:
    """Row of the first video token, in all heads."""
    return int(self.heads.video_rows[0, 0])

  def _pruned_rows(self, head, index, valid):
    """Returns (rows int32[B, Q, R], visible bool[B, Q, R]) of kept heads.

    Text in front of the video, the kept tokens, the text between and behind.
    """
    rows = jax.vmap(lambda own, index: own[index])(head.video_rows, index)
    around = head.text_rows[:, None]
    around = jnp.broadcast_to(around, (*rows.shape[:2], around.shape[-1]))
    parts = jnp.split(around, [self.video_start], axis=-1)
    there = [part < head.length[:, None, None] for part in parts]
    rows = jnp.concatenate([parts[0], rows, parts[1]], axis=-1)
    return rows, jnp.concatenate([there[0], valid, there[1]], axis=-1)

  def first_layer(self, params, video: TowerOutput, ids, lengths, which=None):
    """Returns float[B, N, D]: the video as the first layer, unmasked, reads it.

    Beside ids int32[B, A], of which int32[B] are before the answer.
    """
    head = self.chosen(which, len(ids))
    x = self._embed(params, video.features, head, ids)
    text = self.model.config.text
    layer = qwen2.DecoderLayer(text, self.model.dtype, self.model.backend)
    offsets = np.arange(ids.shape[1])
    cos, sin = qwen2.angles(text, _with_text(head, head.positions, offsets))
    first = jax.tree.map(lambda p: p[0], params["language_model"]["layers"])
    options = {"causal": False, "lengths": self.text_start + lengths}
    if (seen := self.seen(head)) is not None:
      mask = _beside(seen, ids.shape[1])
      options["mask"] = jnp.broadcast_to(mask, (*x.shape[:2], x.shape[1]))
    h, _ = layer.apply({"params": first}, x, cos, sin, **options)
    return jax.vmap(lambda h, rows: h[rows])(h, head.video_rows)


def _like(row, rows):
  return jnp.broadcast_to(row, (*rows.shape[:-1], len(row)))


def _beside(seen, count: int):
  """Returns bool[B, 1, H + count], True behind the head."""
  return jnp.pad(seen, [(0, 0), (0, 0), (0, count)], constant_values=True)


def _with_text(head, positions, offsets):
  """Returns int32[B, ..., P, R + A]: text goes on behind the head."""
  text = head.following[:, None] + offsets
  text = text.reshape(len(text), *[1] * (positions.ndim - 2), -1)
  text = jnp.broadcast_to(text, (*positions.shape[:-1], len(offsets)))
  return jnp.concatenate([positions, text], axis=-1)


def _deep(deep, video_rows):
  """Returns the options of `forward` that add feature maps."""
  return {} if deep is None else {"deep": deep, "video_rows": video_rows}


def _between(own, mean, share):
  share = share.astype(mean.dtype)
  return (1 - share) * own + share * mean


def _cluster_means(features, index, valid):
  """Returns f(map float[B, N, D]) -> float[B, Q, K, D], means of clusters.

  Of the tokens next to each kept one: by features float[B, N, D], each token
  goes to the kept one of largest cosine.
  """
  size = jnp.linalg.norm(features, axis=-1, keepdims=True)
  unit = features / (size + 1e-6)
  kept = jax.vmap(lambda f, i: f[i])(unit, index)
  alike = jnp.einsum("bqkd,bnd->bqkn", kept, unit)
  alike = jnp.where(valid[..., None], alike, -jnp.inf)
  nearest = jax.nn.one_hot(alike.argmax(2), index.shape[-1], dtype=unit.dtype)
  count = jnp.maximum(nearest.sum(2)[..., None], 1)
  return lambda x: jnp.einsum("bqnk,bnd->bqkd", nearest, x) / count
