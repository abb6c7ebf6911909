"""The small base model on questions packed behind one video.

Axes: B clips, T frames, N video tokens, Q questions of a clip, A tokens of a
question with its answer, K kept video tokens, L of a whole prompt, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import processors, qwen2, rope


@dataclasses.dataclass(frozen=True)
class PackedPrompts:
  """Static layout: prefix text, N video tokens, newline, packed questions."""

  model: Any  # Of `models.llava_onevision`.
  prefix: Sequence[int]  # Ids in front of the video.
  num_video: int
  num_questions: int
  question_length: int

  @property
  def video_rows(self) -> np.ndarray:
    return len(self.prefix) + np.arange(self.num_video, dtype=np.int32)

  @property
  def text_start(self) -> int:
    return len(self.prefix) + self.num_video + 1

  def packed_mask(self) -> jax.Array:
    """Returns bool[L, L]: causal, and no question sees another."""
    length = self.num_questions * self.question_length
    question = 1 + np.arange(length) // self.question_length
    # A program computes it: as a constant, thousands of rows are 50 MB of it.
    segment = jnp.pad(question, (self.text_start, 0))
    causal = jnp.tril(jnp.ones((len(segment),) * 2, bool))
    same = segment[:, None] == segment[None, :]
    return causal & (same | (segment == 0)[None, :])

  def packed_positions(self) -> np.ndarray:
    """Returns int32[L]: every question starts right behind the video."""
    offsets = np.tile(np.arange(self.question_length), self.num_questions)
    text = self.text_start + offsets
    return np.concatenate([np.arange(self.text_start), text]).astype(np.int32)

  def encode(self, params, pixels):
    """Returns features float[B, N, D] of clips float32[B, T, h, w, 3]."""

    def one(pixels):
      grid = self.model.grid(*pixels.shape[:3])
      inputs = processors.TowerInputs(pixels, grid)
      return self.model.encode(params, inputs).features

    return jax.vmap(one)(pixels)

  def _embed(self, params, features, ids):
    """Returns float[B, L, D], text int32[B, any] behind head and video."""
    # Ids under the video are 0.
    head = np.array([*self.prefix, *[0] * (self.num_video + 1)], np.int32)
    head = jnp.broadcast_to(head, (len(ids), len(head)))
    embed = jax.vmap(self.model.embed_prompt, (None, 0, 0, None))
    rows = jnp.concatenate([head, ids], axis=1)
    return embed(params, rows, features, self.video_rows)

  def full_logits(self, params, features, ids):
    """Returns float32[B, Q, A, V] of whole videos float[B, N, D]."""
    batch, num_questions, length = ids.shape
    x = self._embed(params, features, ids.reshape(batch, -1))
    positions = self.packed_positions()
    positions = jnp.broadcast_to(positions, (batch, 1, x.shape[1]))
    mask = self.packed_mask()[None]  # Shared by the batch.
    hidden, _ = self.model.forward(
      params, x, positions, mask=mask, causal=False
    )
    hidden = hidden[:, self.text_start :]
    hidden = hidden.reshape(batch, num_questions, length, -1)
    return self.model.logits(params, hidden)

  def pruned_logits(self, params, features, ids, index, valid, merged=None):
    """Answers each question from its own kept tokens, at original positions.

    They are int32[B, Q, K], ascending where valid bool[B, Q, K] is True. By
    share `merged` float32[B, Q], a kept token becomes the mean of the tokens
    that are most alike to it.
    """
    batch, num_questions, length = ids.shape
    start = len(self.prefix)
    # [B, prefix + N + 1, D]
    whole = self._embed(params, features, ids[:, 0, :0])
    rows = jnp.pad(start + index, ((0, 0), (0, 0), (start, 1)))
    rows = rows.at[..., :start].set(jnp.arange(start))
    rows = rows.at[..., -1].set(start + self.num_video)
    seen = jax.vmap(lambda w, r: w[r])(whole, rows)  # [B, Q, prefix + K + 1, D]
    if merged is not None:
      means = _cluster_means(whole[:, self.video_rows], index, valid)
      share = merged[..., None, None].astype(means.dtype)
      kept = np.s_[:, :, start:-1]
      seen = seen.at[kept].set((1 - share) * seen[kept] + share * means)
    x = jnp.concatenate([seen, self.model.embed_text(params, ids)], axis=2)
    text = self.text_start + jnp.arange(length)
    text = jnp.broadcast_to(text, (batch, num_questions, length))
    positions = jnp.concatenate([rows, text], axis=-1)
    total = x.shape[2]
    around = ((0, 0), (0, 0), (start, 1 + length))
    visible = jnp.pad(valid, around, constant_values=True)
    causal = jnp.tril(jnp.ones((total, total), bool))
    mask = causal & visible[..., None, :]
    x = x.reshape(-1, total, x.shape[-1])
    positions = positions.reshape(-1, 1, total)
    mask = mask.reshape(-1, total, total)
    hidden, _ = self.model.forward(
      params, x, positions, mask=mask, causal=False
    )
    hidden = hidden.reshape(batch, num_questions, total, -1)
    return self.model.logits(params, hidden[:, :, -length:])

  def first_layer(self, params, features, ids, lengths):
    """Returns float[B, N, D]: the video as the first layer, unmasked, reads it.

    Beside ids int32[B, A], of which int32[B] are before the answer.
    """
    x = self._embed(params, features, ids)
    text = self.model.config.text
    layer = qwen2.DecoderLayer(text, self.model.dtype, self.model.backend)
    positions = jnp.arange(x.shape[1])[None]
    cos, sin = rope.angles(
      positions[:, None], text.head_dim, text.rope_theta, text.rope_sections
    )
    first = jax.tree.map(lambda p: p[0], params["language_model"]["layers"])
    seen = {"causal": False, "lengths": self.text_start + lengths}
    h, _ = layer.apply({"params": first}, x, cos, sin, **seen)
    return h[:, self.video_rows]


def _cluster_means(features, index, valid):
  """Returns float[B, Q, K, D], the mean of the tokens next to each kept one.

  Of features float[B, N, D], each goes to the kept one of largest cosine.
  """
  size = jnp.linalg.norm(features, axis=-1, keepdims=True)
  unit = features / (size + 1e-6)
  kept = jax.vmap(lambda f, i: f[i])(unit, index)
  alike = jnp.einsum("bqkd,bnd->bqkn", kept, unit)
  alike = jnp.where(valid[..., None], alike, -jnp.inf)
  nearest = jax.nn.one_hot(alike.argmax(2), index.shape[-1], dtype=unit.dtype)
  count = nearest.sum(2)[..., None]
  total = jnp.einsum("bqnk,bnd->bqkd", nearest, features)
  return total / jnp.maximum(count, 1)
