"""The prompts of a golden folder, as our models take them.

Axes: B batch, L prompt tokens, N video tokens.
"""

import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors


class GoldenPrompts:
  """The left-padded batch, rolled to right padding.

  `video_rows` int32[B, N] are L behind the `num_video` int[B] of a video.
  """

  def __init__(self, config, golden, num_video, num_newlines=0):
    self._golden = golden
    mask = golden["attention_mask"].astype(bool)
    if len(mask) != len(num_video):
      raise errors.UserError(
        f"golden.npz: {len(mask)} prompts and {len(num_video)} videos; each"
        " prompt needs one"
      )
    self.num_video = num_video
    self.lengths = np.asarray(mask.sum(axis=1), np.int32)
    # Row i of the rolled prompt is row order[i] of the padded one.
    self._order = np.argsort(~mask, axis=1, kind="stable")
    self.valid = np.take_along_axis(mask, self._order, axis=1)
    self.ids = self.roll(golden["input_ids"])
    is_video = (np.asarray(self.ids) == config.video_token_id) & self.valid
    if (is_video.sum(axis=1) != num_video + num_newlines).any():
      raise errors.UserError(
        f"golden.npz: the prompts need {num_video.tolist()} video tokens"
        f"{' and one newline' if num_newlines else ''}; the pixels and the ids"
        " do not belong together"
      )
    # A newline, of the same id, is behind them.
    first = np.argsort(~is_video, axis=1, kind="stable")[:, : max(num_video)]
    is_own = np.arange(first.shape[1]) < num_video[:, None]
    self.video_rows = np.where(is_own, first, mask.shape[1]).astype(np.int32)

  def roll(self, array):
    """Returns int32[B, L] of array[B, L], right padded."""
    return jnp.asarray(np.take_along_axis(array, self._order, 1), jnp.int32)

  def select(self, array):
    """Returns the valid rows of array[B, L, ...], in the rolled order."""
    index = self._order.reshape(self._order.shape + (1,) * (array.ndim - 2))
    return np.take_along_axis(array, index, axis=1)[self.valid]

  def rows(self, name):
    return self.select(self._golden[name])
