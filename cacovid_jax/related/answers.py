"""Questions about drawn clips, answered by the small base model from few rows.

Clips are drawn and encoded once, as in pretraining, without files. What answers
are read from are rows in place of the video's tokens, each at the place of one.

Axes: n clips, q questions in all, A tokens of one with its answer, N video
tokens, K rows, B batch, D width, V vocabulary.
"""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import base_config, compressors, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.models import layers, prompt_batch, token_grid
from cacovid_jax.policy import network
from cacovid_jax.synthetic import base_models, packed, packing, world
from cacovid_jax.synthetic import losses as losses_lib

_GRID = world.SMALL.grid
_AT_ONCE = 8  # Clips to encode, and questions to answer.


class Asked(NamedTuple):
  """Lettered questions about clips."""

  features: Any  # float32[n, N, D].
  clip: Any  # int32[q], of the n.
  ids: Any  # int32[q, A].
  letter: Any  # int32[q], place of the answer's letter.

  def take(self, which) -> tuple[Any, Any, Any]:
    """Returns (features float32[B, N, D], ids, letter) of int32[B] of q."""
    return self.features[self.clip[which]], self.ids[which], self.letter[which]


def unlike(found, told, there):
  """Returns float32[], how much of the variance of `told` is not `found`.

  Of rows float[B, layers, A, C], those of bool[B, A]; the mean of all layers'
  channels.
  """
  share = (there / there.sum())[:, None, :, None]
  mean = functools.partial(jnp.sum, axis=(0, 2), keepdims=True)
  center = mean(told * share)
  spread = mean(jnp.square(told - center) * share)
  return (mean(jnp.square(found - told) * share) / (spread + 1e-6)).mean()


@dataclasses.dataclass(frozen=True)
class Answers:
  """The shipped base model with clips of a variant, train and test apart."""

  variant: str  # Of `world.VARIANTS`, of the small stage.
  count: tuple[int, int]  # Clips to train on and to test on.
  policy: str = ""  # Path of the one to compare with; "" is the shipped one.

  @functools.cached_property
  def experiment(self) -> experiment_lib.Experiment:
    """That of the base model and the policy, in float32."""
    config = base_config.get_config()
    if self.policy:
      config.evals.policies = (f"policy={self.policy}",)
    changes = {"model.dtype": "float32", "data.num_frames": _GRID[0]}
    config = experiment_lib.with_shipped(config_lib.replace(config, changes))
    return experiment_lib.Experiment.from_config(config)

  @property
  def params(self) -> Any:
    """Of the base model."""
    return self.experiment.loaded.params

  @functools.cached_property
  def _pack(self) -> packing.PackingConfig:
    path = os.path.join(self.experiment.config.model.path, "tokenizer.json")
    return packing.PackingConfig(tokenizer_file=path)

  @functools.cached_property
  def prompts(self) -> packed.PackedPrompts:
    """How questions about these clips are laid out."""
    loaded = self.experiment.loaded
    family = base_models.FAMILIES["llava_onevision"]
    given = loaded.model, loaded.tokenizer, self._pack
    return base_models.prompts_of(family, *given)

  @functools.cache  # noqa: B019 (a run has a few of these)
  def asked(self, split: str) -> Asked:
    """Returns the questions of "train" or "test"."""
    number = ("train", "test").index(split)
    # No batch of the base model's pretraining begins like this.
    rng = np.random.default_rng((number, 2**31 + 1, len(self.variant)))
    count = self.count[number]
    batch = packing.lettered(self._pack, rng, self.variant, count)
    clip, place = np.nonzero(batch["kind"] >= 0)
    letter = batch["target"][clip, place].argmax(axis=-1)
    ids = batch["ids"][clip, place]
    found = Asked(self._encoded(batch), clip, ids, letter)
    return jax.tree.map(jnp.asarray, found)

  def _encoded(self, batch):
    @jax.jit
    def encode(params, rng, batch):
      pixels = losses_lib.draw_frames(rng, batch)
      return self.prompts.encode(params, pixels).features

    found = []
    for start in range(0, len(batch["ids"]), _AT_ONCE):
      part = {name: x[start : start + _AT_ONCE] for name, x in batch.items()}
      found.append(encode(self.params, jax.random.key(start), part))
    return jnp.concatenate(found)

  def text(self, ids):
    """Returns float32[B, D], the mean embedding of questions int32[B, A].

    Of their text up to the turn's end, of which `compressors` see the rows.
    """
    end = self.experiment.loaded.tokenizer.token_id("<|im_end|>")
    there = jnp.cumsum(ids == end, axis=-1)[..., None] == 0
    x = self.prompts.model.embed_text(self.params, ids)
    return jnp.where(there, x, 0.0).sum(axis=1) / there.sum(axis=1)

  @functools.cache  # noqa: B019
  def heard(self) -> jax.Array:
    """Returns float16[q, layers - 1, A, C], what `read` gives of whole clips.

    Of training's, kept on the device: a batch of them is no transfer. A clip is
    read once for all its questions.
    """
    asked = self.asked("train")
    clip = np.asarray(asked.clip)
    place = np.arange(len(clip)) - np.searchsorted(clip, clip)

    @jax.jit
    def read(params, features, ids):
      # A clip of fewer questions than others is asked blank ones, too.
      blank = jnp.zeros((len(features), place.max() + 1, ids.shape[1]), int)
      packed_ids = blank.at[clip, place].set(ids)

      def one(given):
        x, ids = given
        video = packed.TowerOutput(x[None])
        given = params, video, ids[None]
        _, out = self.prompts.full_hidden(*given, want_cache=True)
        return _of_questions(out, ids.shape[1]).astype(jnp.float16)

      return jax.lax.map(one, (features, packed_ids))[clip, place]

    return read(self.params, asked.features, asked.ids)

  def logits(self, *given):
    """Returns float32[B, V] where the letter is asked for; see `read`."""
    return self.read(*given)[0]

  def read(self, params, rows, index, ids, letter, want_cache=False):
    """Returns (logits float32[B, V] where the letter is asked for, cache).

    Of rows float32[B, K, D] at the places int32[B, K] of distinct tokens; the
    base model's `params` are given, as they may be trained. If wanted, `cache`
    float32[B, layers - 1, A, C] are keys and values of the question's rows. The
    first layer's are left out: they do not depend on the video.
    """
    shape = len(rows), self.prompts.num_video, rows.shape[-1]
    features = jax.vmap(lambda x, i, r: x.at[i].set(r))
    video = packed.TowerOutput(features(jnp.zeros(shape), index, rows))
    hidden, out = self.prompts.pruned_hidden(
      params, video, ids[:, None], index[:, None],
      jnp.ones((len(rows), 1, rows.shape[1]), bool), want_cache=want_cache,
    )  # fmt: skip
    last = hidden[jnp.arange(len(rows)), 0, letter - 1]
    logits = self.prompts.model.logits(params, last)
    if not want_cache:
      return logits, None
    return logits, _of_questions(out, ids.shape[1])

  def loss(self, params, rows, index, ids, letter, heard=None):
    """Returns float32[], the cross entropy of the letters; see `read`.

    And how far its keys and values are from those of the whole clip, float[B,
    layers - 1, A, C] of `heard`, if given: a distillation, `unlike`.
    """
    given = params, rows, index, ids, letter
    logits, cache = self.read(*given, want_cache=heard is not None)
    told = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(told, _letters(ids, letter), axis=-1).mean()
    if heard is None:
      return loss
    there = jnp.arange(ids.shape[1]) < letter[:, None]
    return loss + unlike(cache, heard.astype(jnp.float32), there)

  def hits(self, made, params=None) -> float:
    """Returns the share of test questions that are answered right.

    `made(which int[B])` -> (rows, index) as `logits` takes them; `params` are
    the base model's, the shipped one's by default.
    """
    asked, found = self.asked("test"), []
    params = self.params if params is None else params
    number = len(asked.ids)
    for start in range(0, number, _AT_ONCE):
      which = np.arange(start, start + _AT_ONCE) % number
      given = *made(which), asked.ids[which], asked.letter[which]
      found.append(np.asarray(_right(self, params, *given)))
    return float(np.concatenate(found)[:number].mean())

  def accuracy(self, compress, own=None) -> float:
    """Returns `hits` of `compress(own, features, ids, letter)`, compiled."""
    made = jax.jit(lambda own, asked, which: compress(own, *asked.take(which)))
    asked = self.asked("test")
    return self.hits(lambda which: made(own, asked, which))

  def method(self, spec: str, num_keep: int):
    """Returns what `accuracy` takes of a method of `compressors`."""
    method = compressors.get(spec)
    needs_scores = "scores" in method.requires

    def one(features, ids, letter):
      scores = self._scores(features, ids, letter) if needs_scores else None
      inputs = base.CompressorInputs(
        features=features, grid=_GRID, scores=scores, rng=jax.random.key(0)
      )
      selection = method.select(inputs, num_keep=num_keep)
      return selection.features, selection.index

    def compress(unused_own, *given):
      return jax.vmap(one)(*given)

    return compress

  def _scores(self, features, ids, letter):
    """Returns the policy's scores of ONE question, read as evaluations do."""
    policy, model = self.experiment.policies["policy"], self.prompts.model
    head = jax.tree.map(lambda x: x[0], self.prompts.heads)
    whole = jnp.concatenate([head.ids, ids])
    text = jnp.arange(len(ids)) + head.following
    text = jnp.broadcast_to(text, (*head.positions.shape[:-1], len(ids)))
    prompt = prompt_batch.PromptBatch(
      x=model.embed_prompt(self.params, whole, features, head.video_rows),
      positions=jnp.concatenate([head.positions, text], axis=-1),
      lengths=self.prompts.text_start + letter,
      video_rows=head.video_rows,
      next_position=head.following,
    )
    grid = token_grid.TokenGrid.of(_GRID)
    given = policy.module, policy.params, prompt, grid
    return network.score(*given, jnp.float32(1.0))


@functools.partial(jax.jit, static_argnums=0)
def _right(answers, params, rows, index, ids, letter):
  """Returns bool[B]; compiled once for each number of rows."""
  best = answers.logits(params, rows, index, ids, letter).argmax(axis=-1)
  return best == _letters(ids, letter)[:, 0]


def _of_questions(out, length):
  """Returns float[B, layers - 1, A, C], keys and values of the last rows."""
  cache = [layers.joined(out[name])[1:] for name in ("keys", "values")]
  cache = jnp.concatenate(cache, axis=-1)[:, :, -length:]
  return jnp.moveaxis(cache.reshape(*cache.shape[:3], -1), 0, 1)


def _letters(ids, letter):
  """Returns int32[B, 1], the tokens of the answers."""
  return jnp.take_along_axis(ids, letter[:, None], axis=-1)


def cases(name, settings, arms, folder, told, policy=""):
  """Returns the cases of a study, one for each of a section's `sizes`.

  Each (variant, size) is `arms(settings, answers, size, folder, seed)`; sizes
  of a variant share its answers, and `told(size)` ends the case's name.
  """
  errors.check(settings.sizes, f"config.{name}.sizes: give at least one")
  own = functools.cache(lambda one: Answers(one, settings.count, policy))
  return {
    f"{variant}, {told(size)}": functools.partial(
      arms, settings, own(variant), size, folder
    )
    for variant, size in settings.sizes
  }
