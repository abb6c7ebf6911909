"""Heads and losses that the small base model is pretrained with.

An answer-only loss on lettered questions stays at guessing; what makes the
model learn is the sum of six losses (weights in the config):

  full      answers with the whole video, which several questions go on from,
            each by itself (the video is read once, same positions);
  pruned    answers with a random subset of the video tokens, most of which
            hold the decisive ones; its gradient stops before the tower, or
            the tower would learn to copy every object into all tokens of its
            frame; in some rows, kept tokens are merged with others;
  told      answers about a scene told in words: binds options to letters;
  labels    the object on each video token, and where in the picture it is,
            read by a head that is thrown away (foreground and background
            averaged apart);
  size      how far the tokens' size is from that of word embeddings;
  asked     which tokens the question is about, read from the first layer
            without causal mask, as a policy reads it.

Axes: B clips, T frames, N video tokens, Q questions of a clip, A tokens of a
question with its answer, K kept video tokens, D width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cacovid_jax import errors
from cacovid_jax.synthetic import questions, render, world

# Standard deviation of a clip's static noise, in grey levels; and of the noise
# of each frame, which stands for compression.
_NOISE, _GRAIN = 4.0, 2.0


def draw_frames(rng, batch, stage=world.SMALL):
  """Draws a batch's frames, as a codec would show them.

  Returns float32[B, F, h, w, 3] in [-1, 1], of what `render.slots` draws: the T
  sampled frames, or those at the "times" float32[B, F] of a batch.
  """
  opacity, shade = map(jnp.asarray, render.sprite_tables())
  size = stage.image_size
  static_rng, frame_rng = jax.random.split(rng)
  shape = (len(batch["sprite"]), 1, size, size, 1)
  static = jax.random.normal(static_rng, shape) * _NOISE
  times, over = jnp.arange(stage.num_frames, dtype=jnp.float32), None
  if "times" in batch:
    times, over = batch["times"], 0
  background = functools.partial(render.background, size=size, xp=jnp)
  background = jax.vmap(jax.vmap(background, (None, 0)), (0, over))
  frames = background(batch["background"], times) + static

  def paint(picture, slot):
    sprite, corner, color = slot
    start = (corner[0].astype(jnp.int32), corner[1].astype(jnp.int32), 0)
    window = (world.SPRITE, world.SPRITE, 3)
    below = jax.lax.dynamic_slice(picture, start, window)
    alpha = jnp.where(sprite >= 0, opacity[sprite], 0.0)[..., None]
    ink = shade[sprite][..., None] * color.astype(jnp.float32)
    ink = below * (1 - alpha) + alpha * ink
    return jax.lax.dynamic_update_slice(picture, ink, start), None

  def paint_all(picture, slots):
    return jax.lax.scan(paint, picture, slots)[0]

  slots = batch["sprite"], batch["corner"], batch["color"]
  frames = jax.vmap(jax.vmap(paint_all))(frames, slots)
  frames = _halve_chroma(frames)
  frames += jax.random.normal(frame_rng, frames.shape) * _GRAIN
  return jnp.clip(frames, 0, 255) / 127.5 - 1.0


def _halve_chroma(frames):
  """Averages color over 2 x 2 pixels, as 4:2:0 video does; luma is kept."""
  weights = jnp.array([0.299, 0.587, 0.114])
  luma = (frames * weights).sum(-1, keepdims=True)
  chroma = frames - luma
  *lead, height, width, channels = chroma.shape
  cells = chroma.reshape(*lead, height // 2, 2, width // 2, 2, channels)
  cells = cells.mean((-4, -2))
  chroma = jnp.repeat(jnp.repeat(cells, 2, axis=-3), 2, axis=-2)
  return luma + chroma


class LabelHead(nn.Module):
  """Reads from a video token what lies on it; used in training only.

  Attributes are read by likeness to the words' embeddings: the token of a red
  star is to lie near " red" and " star", as the projectors of released models
  put pictures among words. A policy of one layer can then match the two.
  """

  @nn.compact
  def __call__(self, features, words):
    """Returns float32[..., 1 + W] logits of video tokens float[..., D].

    Of an object, its attributes and place; `words` are float[W, D] embeddings
    of the latter.
    """
    features = _of_size_one(features)
    words = words.astype(jnp.float32)
    words = words / (jnp.linalg.norm(words, axis=-1, keepdims=True) + 1e-6)
    scale = self.param("scale", nn.initializers.ones, ())
    likeness = scale * features @ words.T
    present = nn.Dense(1, name="present")(features)
    return jnp.concatenate([present, likeness], axis=-1)


class AskedHead(nn.Module):
  """Whether a question is about a token, from the first layer; training only.

  One direction of length 1: the layer cannot leave a faint trace for large
  weights to read, so heads that learn from rewards find it as well.
  """

  @nn.compact
  def __call__(self, read):
    """Returns float32[...] logits of read float[..., D]."""
    width = read.shape[-1]
    way = self.param("direction", nn.initializers.normal(1.0), (width,))
    bias = self.param("bias", nn.initializers.zeros, ())
    way = way / (jnp.linalg.norm(way) + 1e-6)
    return _of_size_one(read) @ way + bias


def _of_size_one(x):
  x = x.astype(jnp.float32)
  return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def balanced_binary_loss(logits, truth):
  """Cross entropy, averaged over true and over false entries apart."""
  truth = truth.astype(jnp.float32)
  entropy = optax.sigmoid_binary_cross_entropy(logits, truth)
  return sum(
    (entropy * share).sum() / (share.sum() + 1) for share in (truth, 1 - truth)
  )


def size_loss(features, table):
  """Returns how far the tokens' size is from that of word embeddings."""
  # Left alone, features grow, and what a layer adds from the question drowns.
  size = 0.5 * jnp.log(jnp.square(features.astype(jnp.float32)).mean(-1) + 1e-6)
  target = 0.5 * jnp.log(jnp.square(table.astype(jnp.float32)).mean() + 1e-6)
  return jnp.square(size - jax.lax.stop_gradient(target)).mean()


def label_loss(logits, labels, stage=world.SMALL):
  """Returns the loss of the label head's logits float32[B, N, 1 + W].

  Labels int8[B, N, A] are the stage's attributes, -1 without an object or
  without a symbol.
  """
  labels = labels.astype(jnp.int32)
  known_at = (labels >= 0).astype(jnp.float32)
  present = known_at[..., 0]
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  sizes = np.cumsum([1, *map(len, stage.attributes)])
  first, *parts = jnp.split(logits, sizes, axis=-1)
  # Apart, because objects cover few tokens.
  loss = balanced_binary_loss(first[..., 0], present)
  # Of objects alone, as attributes are; next to a middle line none has a name.
  sides = np.indices((stage.side, stage.side)).reshape(2, -1)
  row, column = np.tile(sides, stage.num_frames) - (stage.side - 1) / 2
  place = 2 * (row > 0) + (column > 0)
  clear = np.minimum(abs(row), abs(column)) > 0.5
  known = [
    (labels[..., number], known_at[..., number])
    for number in range(len(stage.attributes))
  ]
  known.append((jnp.broadcast_to(place, present.shape), present * clear))
  for part, (truth, told) in zip(parts, known, strict=True):
    entropy = cross_entropy(part, jnp.maximum(truth, 0))
    loss += (entropy * told).sum() / (told.sum() + 1)
  return loss


def words_of(stage=world.SMALL) -> list[str]:
  """Returns the W words that the label head reads."""
  words = [word for names in stage.attributes for word in names]
  return [*words, *questions.PLACES]


def word_ids(tokenizer, stage=world.SMALL):
  """Returns int32[W], the one token of each attribute's and place's word."""
  ids = {word: tokenizer.encode(f" {word}") for word in words_of(stage)}
  split = [word for word, found in ids.items() if len(found) > 1]
  if split:
    raise errors.UserError(
      f"the tokenizer splits {', '.join(split)}; raise config.vocab_size"
    )
  return np.array(list(ids.values()), np.int32)[:, 0]


def token_loss(logits, ids, target):
  """Returns the mean cross entropy of the target tokens, [..., A]."""
  entropy = optax.softmax_cross_entropy_with_integer_labels(
    logits[..., :-1, :], ids[..., 1:]
  )
  weight = target[..., 1:].astype(jnp.float32)
  return (entropy * weight).sum() / (weight.sum() + 1e-6)


def hits(logits, ids, target):
  """Returns bool[..., Q], whether the first answer token is the likeliest."""
  first = jnp.argmax(target, axis=-1, keepdims=True)  # [..., Q, 1]
  at = jnp.take_along_axis(logits, (first - 1)[..., None], axis=-2)
  want = jnp.take_along_axis(ids, first, axis=-1)
  return (at.argmax(-1) == want).squeeze(-1)


def random_subsets(rng, decisive, num_valid, pull, *, num_keep):
  """Draws kept tokens: the decisive int16[B, Q, M], -1 unused, then others.

  `num_valid` int32[B, Q] are kept, at most K; `pull` float32[B, Q, N] in [0, 1)
  is how far a token is moved to the front of the others. Returns (index
  int32[B, Q, K] ascending, invalid ones last, valid bool[B, Q, K]).
  """
  num_video = pull.shape[-1]
  order = jax.random.uniform(rng, pull.shape)
  hot = jax.nn.one_hot(decisive, num_video).max(axis=2)  # -1 gives zeros
  _, drawn = jax.lax.top_k(order + pull + 2 * hot, num_keep)
  valid = jnp.arange(num_keep) < num_valid[..., None]
  index = jnp.sort(jnp.where(valid, drawn, num_video), axis=-1)
  valid = index < num_video
  return jnp.where(valid, index, 0), valid


def lossy_subsets(rng, batch, config):
  """Draws the `random_subsets` of the pruned loss, as rules leave them.

  In a share of rows decisive tokens go missing: a model that always finds them
  is as sure of a guess as of an answer. In another the rest is objects rather
  than background: that is what rules keep.
  """
  rngs = jax.random.split(rng, 6)
  decisive = batch["decisive"]
  rows = decisive.shape[:2]
  lossy = jax.random.bernoulli(rngs[0], config.lossy_share, rows)
  loss_rate = jnp.where(lossy, jax.random.uniform(rngs[1], rows), 0.0)
  lost = jax.random.uniform(rngs[2], decisive.shape) < loss_rate[..., None]
  crowded = jax.random.bernoulli(rngs[3], config.crowded_share, rows)
  has_object = batch["labels"][:, None, :, 0] >= 0
  return random_subsets(
    rngs[4],
    jnp.where(lost, -1, decisive),
    jax.random.randint(rngs[5], rows, config.min_keep, config.num_keep + 1),
    0.9 * (crowded[..., None] & has_object),
    num_keep=config.num_keep,
  )


def merged_shares(rng, batch, config):
  """Draws float32[B, Q], how far kept tokens become means of their likes.

  0 outside of `merged_share` of the rows, None if that is nothing. A model that
  never met merged tokens misreads them, and methods that merge would seem worse
  than they are.
  """
  if not config.merged_share:
    return None
  rows = batch["decisive"].shape[:2]
  rngs = jax.random.split(jax.random.fold_in(rng, 6))
  merged = jax.random.bernoulli(rngs[0], config.merged_share, rows)
  return merged * jax.random.uniform(rngs[1], rows)


def asked_logits(prompts, params, video, batch, count: int):
  """Returns the asked head's logits float32[B * count, N], and what is true.

  Of the first `count` questions of each clip; true float32 is 1 on decisive
  tokens.
  """
  ids, target, which = batch["ids"], batch["target"], batch.get("head")
  repeated = functools.partial(jnp.repeat, repeats=count, axis=0)
  read = prompts.first_layer(
    params["model"],
    jax.tree.map(repeated, video),
    ids[:, :count].reshape(-1, ids.shape[-1]),
    jnp.argmax(target[:, :count], axis=-1).reshape(-1),
    None if which is None else repeated(which),
  )
  decisive = batch["decisive"][:, :count]
  decisive = decisive.reshape(-1, decisive.shape[-1])
  truth = jax.nn.one_hot(decisive, prompts.num_video).max(axis=1)
  return AskedHead().apply({"params": params["asked"]}, read), truth


def answer_losses(
  prompts, params, rng, batch, *, config, word_ids, stage=world.SMALL
):
  """Returns the six losses {name: float32[]}, and which answers are right.

  The latter {"full", "pruned": bool[B, Q], "told": bool[B, 1]}; `prompts` are
  `packed.PackedPrompts`, `batch` of `packing.Packer.batch`.
  """
  frame_rng, subset_rng = jax.random.split(rng)
  model, weights = prompts.model, params["model"]
  pixels = draw_frames(frame_rng, batch, stage).astype(model.dtype)
  video = prompts.encode(weights, pixels)
  ids, target, which = batch["ids"], batch["target"], batch.get("head")
  index, valid = lossy_subsets(subset_rng, batch, config)
  logits = {
    "full": prompts.full_logits(weights, video, ids, which),
    "pruned": prompts.pruned_logits(
      weights,
      jax.lax.stop_gradient(video),
      ids,
      index,
      valid,
      merged_shares(subset_rng, batch, config),
      which,
    ),
  }
  found = {name: token_loss(x, ids, target) for name, x in logits.items()}
  right = {name: hits(x, ids, target) for name, x in logits.items()}

  # Of a few questions: each reads all video tokens anew.
  found["asked"] = balanced_binary_loss(
    *asked_logits(prompts, params, video, batch, config.asked_questions)
  )

  told = batch["told_ids"]
  count, length = told.shape
  shape = count, model.num_position_rows, length
  positions = jnp.broadcast_to(jnp.arange(length), shape)
  hidden, _ = model.forward(weights, model.embed_text(weights, told), positions)
  told_logits = model.logits(weights, hidden)
  found["told"] = token_loss(told_logits, told, batch["told_target"])
  right["told"] = hits(
    told_logits[:, None], told[:, None], batch["told_target"][:, None]
  )

  table = weights["language_model"]["embed_tokens"]
  head = {"params": params["head"]}
  labels = LabelHead().apply(head, video.features, table[word_ids])
  found["size"] = size_loss(video.features, table)
  found["labels"] = label_loss(labels, batch["labels"], stage)
  return found, right
