"""Clips of the embedded benchmark with their captions, encoded once.

Axes: n clips, T frames, P tokens of a frame, A tokens of a caption, D width.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import base_config, compressors, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.inference import clip_queue
from cacovid_jax.synthetic import build, world


@dataclasses.dataclass(frozen=True)
class Clips:
  """The clips of a config's section, drawn and encoded when asked for."""

  root: str  # Folder of the clips, built if it is not there.
  variant: str  # Of `world.VARIANTS`.
  count: tuple[int, int]  # Clips to train on and to test on.
  seed: int = 0  # Of the clips.

  SPLITS = ("train", "test")

  @functools.cached_property
  def experiment(self) -> experiment_lib.Experiment:
    """The shipped base model and its clips."""
    config = experiment_lib.with_shipped(base_config.get_config())
    train, test = self.count
    changes = {
      "data.root": self.root,
      "data.num_frames": world.SMALL.num_frames,
      "data.feature_cache": os.path.join(self.root, "features"),
      "model.dtype": "float32",
      "prepare.variants": (self.variant,),
      "prepare.clips": (train, 0, test, 0),
      "prepare.seed": self.seed,
    }
    config = config_lib.replace(config, changes)
    build.prepare(config)
    return experiment_lib.Experiment.from_config(config)

  @functools.cached_property
  def _captions(self) -> dict[str, list[str]]:
    path = pathlib.Path(self.experiment.config.data.root, "captions.jsonl")
    try:
      lines = path.read_text(encoding="utf-8").splitlines()
      rows = [json.loads(line) for line in lines]
      return {row["clip"]: row["captions"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f"{path}: no captions can be read ({errors.one_line(error)}); delete"
        " the folder to draw the clips anew"
      ) from error

  def names(self, split: str) -> list[str]:
    """Returns the clips of a split, in order."""
    start = f"{self.variant}_{split}_"
    return [name for name in self._captions if name.startswith(start)]

  @functools.cached_property
  def _store(self):
    return clip_queue.open_queue(self.experiment, keep=1)

  def features(self, names) -> np.ndarray:
    """Returns float32[n, T, P, D] of clips by name."""
    found = []
    for name in names:
      loaded = self._store.load(os.path.join("videos", f"{name}.mp4"))
      (clip,) = self._store.finish([loaded])
      T, H, W = clip.grid
      found.append(clip.features.reshape(T, H * W, -1))
    return np.stack(found)

  def text(self, texts) -> tuple[Any, Any]:
    """Returns the base model's embeddings float32[n, A, D], bool[n, A]."""
    loaded = self.experiment.loaded
    ids = [loaded.tokenizer.encode(text) for text in texts]
    mask = np.arange(max(map(len, ids))) < np.array([[len(one)] for one in ids])
    padded = np.zeros(mask.shape, np.int32)
    padded[mask] = np.concatenate(ids)
    x = loaded.model.embed_text(loaded.params, padded)
    return x * mask[..., None], jnp.asarray(mask)

  @functools.cache  # noqa: B019 (a run has one or two of these)
  def pairs(self, split: str, num_tokens: int = 0):
    """Returns captions and videos, each (float32[n, any, D], bool[n, any]).

    A video's tokens are the means of its frames, or if a number is given so
    many that DivPrune keeps; a caption is the first of its clip's.
    """
    names = self.names(split)
    captions = captions_of(self._captions, names)
    x = self.features(names)
    if num_tokens:
      x = x.reshape(len(x), -1, x.shape[-1])
      given = dict(spec="divprune", num_keep=num_tokens)
      x = rows_of(jax.random.key(0), x, **given).rows
    else:
      x = x.mean(axis=2)
    video = jnp.asarray(x), jnp.ones(x.shape[:2], bool)
    return self.text(captions), video


class Rows(NamedTuple):
  """What a method leaves of clips, questions unseen."""

  rows: Any  # float32[n, K, D].
  index: Any  # int32[n, K].


@functools.partial(jax.jit, static_argnames=("spec", "num_keep"))
def rows_of(rng, features, *, spec, num_keep) -> Rows:
  """Returns the rows of clips float32[n, N, D] by a method's spec."""
  method = compressors.get(spec)

  def one(given):
    x, number = given
    inputs = base.CompressorInputs(
      features=x, grid=world.SMALL.grid, rng=jax.random.fold_in(rng, number)
    )
    found = method.select(inputs, num_keep=num_keep)
    return Rows(found.features, found.index)

  return jax.lax.map(one, (features, jnp.arange(len(features))), batch_size=8)


def captions_of(known, names) -> list[str]:
  """Returns the first caption of each clip, of {name: captions}.

  Raises:
    UserError: a clip has none.
  """
  missing = [name for name in names if not known.get(name)]
  if missing or not names:
    what = f"{missing[0]} of {len(names)} clips" if missing else "all clips"
    raise errors.UserError(
      f"captions are missing, of {what}; captions.jsonl comes with"
      " cacovid_jax.prepare"
    )
  return [known[name][0] for name in names]
