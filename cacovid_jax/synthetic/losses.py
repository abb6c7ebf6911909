"""Heads and losses that the small base model is pretrained with.

An answer-only loss on lettered questions stays at guessing; what makes the
model learn is the sum of six losses (weights in the config):

  full      answers with the whole video, several questions packed behind one
            shared video prefix (block-diagonal mask, same positions);
  pruned    answers with a random subset of the video tokens, most of which
            hold the decisive ones; its gradient stops before the tower, or
            the tower would learn to copy every object into all tokens of its
            frame;
  told      answers about a scene told in words: binds options to letters;
  labels    the object on each video token, and the token's place in the
            picture, read by a head that is thrown away (foreground and
            background averaged apart);
  size      how far the tokens' size is from that of word embeddings;
  asked     which tokens the question is about, read from the first layer
            without causal mask, as a policy reads it.

Frames are drawn on the accelerator, so every step sees fresh clips.

Axes: B clips, T frames, N video tokens, Q questions of a clip, A tokens of a
question with its answer, K kept video tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cacovid_jax import errors
from cacovid_jax.models import processors, qwen2, rope
from cacovid_jax.synthetic import render, world

ATTRIBUTES = (
  len(world.COLOR_NAMES),
  len(world.PATTERNS),
  len(world.SHAPES),
)
# As the options of "where" questions say them.
_SIDES = (("top", "bottom"), ("left", "right"))


def draw_frames(rng, batch, *, noise=4.0, grain=2.0):
  """Draws the sampled frames of a batch of scenes, as a codec would show them.

  Args:
    rng: key of the noise.
    batch: of `packing.Packer.batch`; sprite int8[B, T, S], corner
      int16[B, T, S, 2], color uint8[B, T, S, 3], background float32[B, 4, 7].
    noise: standard deviation of a clip's static noise, in grey levels.
    grain: of the noise of each frame, standing for compression.

  Returns:
    float32[B, T, 112, 112, 3] normalised pixels in [-1, 1].
  """
  opacity, shade = (jnp.asarray(t) for t in render.sprite_tables())
  num_clips = batch["sprite"].shape[0]
  size = world.IMAGE_SIZE
  static_rng, frame_rng = jax.random.split(rng)
  static = jax.random.normal(static_rng, (num_clips, 1, size, size, 1)) * noise
  times = jnp.arange(world.NUM_FRAMES, dtype=jnp.float32)

  def backgrounds(params):
    return jax.vmap(lambda time: render.background(params, time, jnp))(times)

  frames = jax.vmap(backgrounds)(batch["background"]) + static

  def paint(picture, slot):
    sprite, corner, color = slot
    start = (corner[0].astype(jnp.int32), corner[1].astype(jnp.int32), 0)
    window = (world.SPRITE, world.SPRITE, 3)
    below = jax.lax.dynamic_slice(picture, start, window)
    alpha = jnp.where(sprite >= 0, opacity[sprite], 0.0)[..., None]
    ink = shade[sprite][..., None] * color.astype(jnp.float32)
    return jax.lax.dynamic_update_slice(
      picture, below * (1 - alpha) + alpha * ink, start
    ), None

  def paint_all(picture, sprite, corner, color):
    return jax.lax.scan(paint, picture, (sprite, corner, color))[0]

  frames = jax.vmap(jax.vmap(paint_all))(
    frames, batch["sprite"], batch["corner"], batch["color"]
  )
  frames = _halve_chroma(frames)
  frames += jax.random.normal(frame_rng, frames.shape) * grain
  return jnp.clip(frames, 0, 255) / 127.5 - 1.0


def _halve_chroma(frames):
  """Averages color over 2 x 2 pixels, as 4:2:0 video does; luma is kept."""
  weights = jnp.array([0.299, 0.587, 0.114])
  luma = (frames * weights).sum(-1, keepdims=True)
  chroma = frames - luma
  *lead, height, width, channels = chroma.shape
  cells = chroma.reshape(*lead, height // 2, 2, width // 2, 2, channels).mean(
    (-4, -2)
  )
  chroma = jnp.repeat(jnp.repeat(cells, 2, axis=-3), 2, axis=-2)
  return luma + chroma


class LabelHead(nn.Module):
  """Reads from a video token what lies on it; used in training only.

  Attributes are read by likeness to the words' embeddings, not by weights of
  their own: the token of a red star is to lie near " red" and " star", as the
  projectors of released models put pictures among words. A policy of one
  layer can then match tokens with the question's words.
  """

  @nn.compact
  def __call__(self, features, words):
    """Returns float32[..., 39] logits.

    Of an object, its color, pattern and shape, of the token's sides, row and
    column.

    Args:
      features: float[..., D] of video tokens.
      words: float[24, D] embeddings of colors, patterns, shapes and sides.
    """
    features = features.astype(jnp.float32)
    size = jnp.sqrt(jnp.square(features).mean(-1, keepdims=True) + 1e-6)
    features = features / size
    words = words.astype(jnp.float32)
    words = words / (jnp.linalg.norm(words, axis=-1, keepdims=True) + 1e-6)
    scale = self.param("scale", nn.initializers.ones, ())
    likeness = scale * features @ words.T
    head = nn.Dense(1 + world.NUM_ROWS + world.NUM_COLS, name="label")
    other = head(features)
    return jnp.concatenate([other[..., :1], likeness, other[..., 1:]], axis=-1)


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
    read = read.astype(jnp.float32)
    size = jnp.sqrt(jnp.square(read).mean(-1, keepdims=True) + 1e-6)
    way = way / (jnp.linalg.norm(way) + 1e-6)
    return (read / size) @ way + bias


def balanced_binary_loss(logits, truth):
  """Cross entropy, averaged over true and over false entries apart."""
  truth = truth.astype(jnp.float32)
  entropy = optax.sigmoid_binary_cross_entropy(logits, truth)
  loss = 0.0
  for share in (truth, 1 - truth):
    loss += (entropy * share).sum() / (share.sum() + 1)
  return loss


def size_loss(features, table):
  """Returns how far the tokens' size is from that of word embeddings.

  Left alone, projected features grow to many times a word's size, and what a
  decoder layer adds to them from the question drowns.
  """
  size = 0.5 * jnp.log(jnp.square(features.astype(jnp.float32)).mean(-1) + 1e-6)
  target = 0.5 * jnp.log(jnp.square(table.astype(jnp.float32)).mean() + 1e-6)
  return jnp.square(size - jax.lax.stop_gradient(target)).mean()


def label_loss(logits, labels):
  """Returns the loss of the label head.

  Args:
    logits: float32[B, N, 39], see `LabelHead`.
    labels: int8[B, N, 3] color, pattern and shape, -1 without an object.
  """
  labels = labels.astype(jnp.int32)
  present = (labels[..., 0] >= 0).astype(jnp.float32)
  # Apart, because objects cover few tokens.
  loss = balanced_binary_loss(logits[..., 0], present)
  start = 1
  for part, size in enumerate(ATTRIBUTES):
    entropy = optax.softmax_cross_entropy_with_integer_labels(
      logits[..., start : start + size], jnp.maximum(labels[..., part], 0)
    )
    loss += (entropy * present).sum() / (present.sum() + 1)
    start += size
  places = [
    (np.tile(place, world.NUM_FRAMES), size)
    for place, size in zip(
      np.indices((world.NUM_ROWS, world.NUM_COLS)).reshape(2, -1),
      (world.NUM_ROWS, world.NUM_COLS),
      strict=True,
    )
  ]
  for place, size in places:
    # The middle row is neither top nor bottom.
    off_middle = place != size // 2
    entropy = optax.softmax_cross_entropy_with_integer_labels(
      logits[..., start : start + 2],
      np.broadcast_to(place > size // 2, logits.shape[:-1]).astype(np.int32),
    )
    loss += (entropy * off_middle).mean() / off_middle.mean()
    start += 2
  for place, size in places:
    entropy = optax.softmax_cross_entropy_with_integer_labels(
      logits[..., start : start + size],
      np.broadcast_to(place, logits.shape[:-1]),
    )
    loss += entropy.mean()
    start += size
  return loss


def word_ids(tokenizer):
  """Returns int32[24], the one token of each attribute's and side's word."""
  words = [*world.COLOR_NAMES, *world.PATTERNS, *world.SHAPES]
  words += [word for sides in _SIDES for word in sides]
  ids = [tokenizer.encode(f" {w}", add_special_tokens=False).ids for w in words]
  split = [
    word for word, found in zip(words, ids, strict=True) if len(found) > 1
  ]
  if split:
    raise errors.UserError(
      f"the tokenizer splits {', '.join(split)}; raise config.vocab_size"
    )
  return np.array(ids, np.int32)[:, 0]


def token_loss(logits, ids, target):
  """Returns the mean cross entropy of the target tokens, [..., A]."""
  entropy = optax.softmax_cross_entropy_with_integer_labels(
    logits[..., :-1, :], ids[..., 1:]
  )
  weight = target[..., 1:].astype(jnp.float32)
  return (entropy * weight).sum() / (weight.sum() + 1e-6)


def hits(logits, ids, target):
  """Returns bool[..., Q], whether the first answer token is the likeliest."""
  first = jnp.argmax(target, axis=-1)  # [..., Q]
  at = jnp.take_along_axis(
    logits, (first - 1)[..., None, None], axis=-2
  ).squeeze(-2)
  want = jnp.take_along_axis(ids, first[..., None], axis=-1).squeeze(-1)
  return at.argmax(-1) == want


class PackedPrompts:
  """Static layout: prefix text, N video tokens, newline, packed questions."""

  def __init__(self, prefix_ids, num_video, num_questions, question_length):
    self.prefix = tuple(prefix_ids)
    self.num_video = num_video
    self.num_questions = num_questions
    self.question_length = question_length
    self.video_rows = len(self.prefix) + np.arange(num_video, dtype=np.int32)
    self.text_start = len(self.prefix) + num_video + 1

  def head_ids(self):
    """int32[prefix + N + 1] before the questions; ids under the video are 0."""
    return np.array(self.prefix + (0,) * (self.num_video + 1), np.int32)

  def packed_mask(self):
    """bool[L, L]: causal, and no question sees another."""
    length = self.num_questions * self.question_length
    segment = np.concatenate(
      [
        np.zeros(self.text_start, int),
        1 + np.arange(length) // self.question_length,
      ]
    )
    causal = np.tril(np.ones((len(segment),) * 2, bool))
    same = segment[:, None] == segment[None, :]
    return causal & (same | (segment == 0)[None, :])

  def packed_positions(self):
    """int32[L]: every question starts right behind the video."""
    offsets = np.tile(np.arange(self.question_length), self.num_questions)
    text = self.text_start + offsets
    return np.concatenate([np.arange(self.text_start), text]).astype(np.int32)


def encode(model, params, pixels):
  """Returns features float[N, D] of one clip float32[T, h, w, 3]."""
  inputs = processors.TowerInputs(pixels, model.grid(*pixels.shape[:3]))
  return model.encode(params, inputs).features


def packed_logits(model, params, prompts, features, ids):
  """Answers all questions of each clip with the whole video.

  Args:
    model: of `models.llava_onevision`.
    params: its parameters.
    prompts: the layout.
    features: float[B, N, D].
    ids: int32[B, Q, A].

  Returns:
    float32[B, Q, A, V].
  """
  batch, num_questions, length = ids.shape
  head = prompts.head_ids()
  head = jnp.broadcast_to(head, (batch, len(head)))
  rows = jnp.concatenate([head, ids.reshape(batch, -1)], axis=1)
  embed = jax.vmap(model.embed_prompt, (None, 0, 0, None))
  x = embed(params, rows, features, prompts.video_rows)
  positions = jnp.broadcast_to(
    prompts.packed_positions(), (batch, 1, x.shape[1])
  )
  mask = prompts.packed_mask()[None]  # Shared by the batch.
  hidden, _ = model.forward(params, x, positions, mask=mask, causal=False)
  hidden = hidden[:, prompts.text_start :]
  hidden = hidden.reshape(batch, num_questions, length, -1)
  return model.logits(params, hidden)


def pruned_logits(model, params, prompts, features, ids, index, valid):
  """Answers each question from its own kept tokens, at original positions.

  Args:
    model: of `models.llava_onevision`.
    params: its parameters.
    prompts: the layout.
    features: float[B, N, D].
    ids: int32[B, Q, A].
    index: int32[B, Q, K] kept tokens, ascending where valid.
    valid: bool[B, Q, K].

  Returns:
    float32[B, Q, A, V].
  """
  batch, num_questions, length = ids.shape
  start = len(prompts.prefix)
  head = prompts.head_ids()
  embed = jax.vmap(model.embed_prompt, (None, None, 0, None))
  # [B, prefix + N + 1, D]
  whole = embed(params, head, features, prompts.video_rows)
  rows = jnp.concatenate(
    [
      jnp.broadcast_to(jnp.arange(start), (batch, num_questions, start)),
      start + index,
      jnp.full((batch, num_questions, 1), start + prompts.num_video),
    ],
    axis=-1,
  )
  seen = jax.vmap(lambda w, r: w[r])(whole, rows)  # [B, Q, prefix + K + 1, D]
  text = model.embed_text(params, ids)
  x = jnp.concatenate([seen, text], axis=2)
  text_positions = prompts.text_start + jnp.arange(length)
  positions = jnp.concatenate(
    [rows, jnp.broadcast_to(text_positions, (batch, num_questions, length))],
    axis=-1,
  )
  total = x.shape[2]
  always = jnp.ones((batch, num_questions, length + 1 + start), bool)
  visible = jnp.concatenate(
    [always[..., :start], valid, always[..., start:]], axis=-1
  )
  causal = jnp.tril(jnp.ones((total, total), bool))
  mask = causal & visible[..., None, :]
  hidden, _ = model.forward(
    params,
    x.reshape(-1, total, x.shape[-1]),
    positions.reshape(-1, 1, total),
    mask=mask.reshape(-1, total, total),
    causal=False,
  )
  hidden = hidden.reshape(batch, num_questions, total, -1)
  return model.logits(params, hidden[:, :, -length:])


def first_layer(model, params, prompts, features, ids, lengths):
  """Reads the video with one question as a new policy does.

  That is the first layer over the unpruned prompt without a causal mask.

  Args:
    model: of `models.llava_onevision`.
    params: its parameters.
    prompts: the layout.
    features: float[B, N, D].
    ids: int32[B, A] of one question per clip.
    lengths: int32[B] tokens of the question, up to its answer.

  Returns:
    float[B, N, D], what the layer made of the video tokens.
  """
  head = prompts.head_ids()
  head = jnp.broadcast_to(head, (len(ids), len(head)))
  rows = jnp.concatenate([head, ids], axis=1)
  embed = jax.vmap(model.embed_prompt, (None, 0, 0, None))
  x = embed(params, rows, features, prompts.video_rows)
  text = model.config.text
  layer = qwen2.DecoderLayer(text, model.dtype, model.backend)
  positions = jnp.arange(x.shape[1])[None]
  cos, sin = rope.angles(
    positions[:, None], text.head_dim, text.rope_theta, text.rope_sections
  )
  first = jax.tree.map(lambda p: p[0], params["language_model"]["layers"])
  h, _ = layer.apply(
    {"params": first},
    x,
    cos,
    sin,
    causal=False,
    lengths=prompts.text_start + lengths,
  )
  return h[:, prompts.video_rows]


def random_subsets(rng, decisive, num_valid, pull, *, num_keep):
  """Draws kept tokens: the decisive ones, then random others.

  Args:
    rng: key.
    decisive: int16[B, Q, M] tokens, -1 where unused.
    num_valid: int32[B, Q] tokens to keep, at most `num_keep`.
    pull: float32[B, Q, N] in [0, 1): how far a token is moved to the front of
      the others; 0 for even chances.
    num_keep: K, static.

  Returns:
    (index int32[B, Q, K] ascending, invalid ones last, valid bool[B, Q, K]).
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
  """Draws the subsets of the pruned loss, as rules and policies leave them.

  In a share of rows decisive tokens go missing: a model that always finds them
  is as sure of a guess as of an answer. In another the rest is objects rather
  than background: that is what rules keep.

  Args:
    rng: key.
    batch: decisive int16[B, Q, M] and labels int8[B, N, 3].
    config: min_keep, num_keep, lossy_share and crowded_share.

  Returns:
    (index int32[B, Q, K] ascending, invalid ones last, valid bool[B, Q, K]).
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


def answer_losses(model, params, rng, batch, *, prompts, config, word_ids):
  """Returns the six losses of a batch and which lettered answers are right.

  Args:
    model: of `models.llava_onevision`.
    params: {"model", "head", "asked"}.
    rng: key of frames and subsets.
    batch: of `packing.Packer.batch`.
    prompts: the layout.
    config: the "pretrain" section of `configs/synthetic_base.py`.
    word_ids: see `word_ids`.

  Returns:
    ({name: float32[]}, {"full", "pruned": bool[B, Q], "told": bool[B, 1]}).
  """
  frame_rng, subset_rng = jax.random.split(rng)
  weights = params["model"]
  features = jax.vmap(lambda p: encode(model, weights, p))(
    draw_frames(frame_rng, batch).astype(model.dtype)
  )
  ids, target = batch["ids"], batch["target"]
  index, valid = lossy_subsets(subset_rng, batch, config)
  fixed = jax.lax.stop_gradient(features)
  logits = {
    "full": packed_logits(model, weights, prompts, features, ids),
    "pruned": pruned_logits(model, weights, prompts, fixed, ids, index, valid),
  }
  found = {name: token_loss(x, ids, target) for name, x in logits.items()}
  right = {name: hits(x, ids, target) for name, x in logits.items()}

  # Of a few questions: each reads all video tokens anew.
  some = config.asked_questions
  read = first_layer(
    model,
    weights,
    prompts,
    jnp.repeat(features, some, axis=0),
    ids[:, :some].reshape(-1, ids.shape[-1]),
    jnp.argmax(target[:, :some], axis=-1).reshape(-1),
  )
  asked = batch["decisive"][:, :some]
  asked = asked.reshape(-1, asked.shape[-1])
  found["asked"] = balanced_binary_loss(
    AskedHead().apply({"params": params["asked"]}, read),
    jax.nn.one_hot(asked, prompts.num_video).max(axis=1),
  )

  told = batch["told_ids"]
  positions = jnp.broadcast_to(
    jnp.arange(told.shape[1]), (told.shape[0], 1, told.shape[1])
  )
  hidden, _ = model.forward(weights, model.embed_text(weights, told), positions)
  told_logits = model.logits(weights, hidden)
  found["told"] = token_loss(told_logits, told, batch["told_target"])
  right["told"] = hits(
    told_logits[:, None], told[:, None], batch["told_target"][:, None]
  )

  table = weights["language_model"]["embed_tokens"]
  labels = LabelHead().apply(
    {"params": params["head"]}, features, table[word_ids]
  )
  found["size"] = size_loss(features, table)
  found["labels"] = label_loss(labels, batch["labels"])
  return found, right
