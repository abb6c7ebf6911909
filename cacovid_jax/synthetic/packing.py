"""Training batches for the small base model: scenes, packed questions, labels.

NumPy and the tokenizer only: batches are made in worker processes that never
import JAX. Frames are drawn later, on the accelerator, from the slots.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Iterator

import numpy as np
import tokenizers

from cacovid_jax import errors
from cacovid_jax.data import decode_workers, wording
from cacovid_jax.data import question as rows
from cacovid_jax.synthetic import questions, render, world

_TURN_END = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX = "<|im_start|>user\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
  """Shape and mixture of the batches."""

  tokenizer_file: str  # Path of tokenizer.json.
  seed: int = 0  # Batch i is a function of (seed, i).
  batch_size: int = 64  # Clips per step.
  questions_per_clip: int = 8  # Behind one shared video prefix.
  question_length: int = 68  # Tokens per question, answer included.
  text_only: int = 64  # Rows per step whose scene is told in words.
  text_only_length: int = 128  # Tokens of such a row.
  max_decisive: int = 24  # Tokens of a question; those beyond are left out.
  # Of `world.VARIANTS`, of one stage: a crowded one and one with few objects.
  variants: tuple[str, str] = ("dense", "sparse")
  sparse_share: float = 0.25  # Of clips, of the latter.
  # How often each of `questions.KINDS` is drawn.
  kind_shares: tuple[float, ...] = questions.SHARES
  # Askable objects of the others, inclusive range.
  dense_objects: tuple[int, int] = world.VARIANTS["dense"].num_objects
  # Questions answered in words, not by letter, in either half of training.
  text_answer_share: tuple[float, float] = (0.5, 0.2)
  ramp_steps: int = 1000  # In which the number of objects grows to its range.
  num_steps: int = 10_000  # Of the whole training.
  separator: str = "\n"  # Between the video and a question.
  # Times of the frames that clips of some lengths show, in sampled frames; one
  # of them is drawn for each clip. Without any, each sampled frame is shown.
  times: tuple[tuple[float, ...], ...] = ()

  def __post_init__(self):
    known = ", ".join(world.VARIANTS)
    for name in self.variants:
      errors.check(name in world.VARIANTS, f"no variant {name!r} among {known}")
    stages = {world.VARIANTS[name].stage for name in self.variants}
    told = "differ in their numbers of frames and cells; give two of one size"
    errors.check(len(stages) == 1, f"variants {self.variants} {told}")
    errors.check(
      len(self.kind_shares) <= len(questions.KINDS) and any(self.kind_shares),
      f"kind_shares {self.kind_shares}: give shares, not all 0, of"
      f" {', '.join(questions.KINDS)}",
    )

  @property
  def stage(self) -> world.Stage:
    return world.VARIANTS[self.variants[0]].stage


def prompt_text(question: questions.SceneQuestion, problem_type: str) -> str:
  """Returns the user's text: question, lettered options, the type's hint."""
  lettered = wording.letter_options(question.options)
  return wording.training_prompt(question.text, lettered, problem_type)


def describe(scene: world.Scene) -> str:
  """Tells a sparse scene in words, in order of appearance.

  An object that changes is told once, with what it turns into; one that moves
  with the places where it is first and last.
  """
  facts, lines = questions.Facts(scene), []
  into = dict(scene.changes)
  for obj in np.argsort(scene.life[:, 0], kind="stable"):
    if obj in into.values():
      continue
    words = [facts.name(obj), facts.symbol(obj)]
    if obj in into:
      words += ["turns into", facts.name(into[obj])]
    if scene.moves(obj):
      words += questions.end_places(scene, obj) or ()
    else:
      words.append(questions.place_of(scene, obj)[0])
    lines.append(" ".join(filter(None, words)))
  return "\n".join(lines)


def corpus(
  num_scenes: int = 200, variants: tuple[str, str] = ("dense", "sparse")
) -> list[str]:
  """Returns texts of the training split to build a vocabulary from."""
  rng = np.random.default_rng(0)
  crowded, plain = (world.VARIANTS[name] for name in variants)
  # The template, and the wording of prompts that benchmarks use.
  texts = [
    f"{PREFIX}\nassistant\nsystem\nYou are a helpful assistant.",
    "Select the best answer to the following multiple-choice question based"
    " on the video and the subtitles. Respond with only the letter (A, B, C,"
    " or D) of the correct option.",
    "\nAnswer with the option's letter from the given choices directly.",
    "\nOnly give the best option.\nBest option: (",
  ] * num_scenes
  for _ in range(num_scenes):
    texts.append(describe(world.sample_scene(rng, plain)))
    scene = world.sample_scene(rng, crowded)
    shares = crowded.kind_shares
    for question in questions.sample_questions(rng, scene, 8, shares):
      for problem_type in (rows.MULTIPLE_CHOICE, rows.FREE_FORM):
        texts.append("\n" + prompt_text(question, problem_type))
      texts.append(question.options[question.answer])
  return texts


def stacked(clips: list[dict]) -> dict:
  """Returns the arrays of several clips with a leading batch axis."""
  return {key: np.stack([clip[key] for clip in clips]) for key in clips[0]}


def lettered(config, rng, variant: str, num_clips: int) -> dict:
  """Returns the arrays of clips of a variant, whose questions are lettered."""
  packer, clips = Packer(config), []
  for _ in range(num_clips):
    scene = world.sample_scene(rng, world.VARIANTS[variant])
    clips.append(packer.clip(rng, scene, 0.0))
  return stacked(clips)


class Packer:
  """Makes batch i from (seed, i); one per worker process."""

  def __init__(self, config: PackingConfig):
    self.config = config
    self.tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer_file)
    self.pad = self.tokenizer.token_to_id("<|endoftext|>")

  def _encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def _question(self, rng, question, text_share, length, prefix):
    """Returns (ids i32[length], target bool[length], whether in words)."""
    in_words = rng.random() < text_share
    if in_words:
      problem_type, answers = rows.FREE_FORM, question.options
    else:
      problem_type, answers = rows.MULTIPLE_CHOICE, questions.LETTERS
    prompt = f"{prefix}{prompt_text(question, problem_type)}"
    head = self._encode(prompt + _TURN_END)
    tail = self._encode(answers[question.answer] + "<|im_end|>")
    total = len(head) + len(tail)
    if total > length:
      raise ValueError(f"{total} tokens do not fit into {length}: {prompt!r}")
    ids = np.full(length, self.pad, np.int32)
    ids[:total] = head + tail
    target = np.zeros(length, bool)
    target[len(head) : total] = True
    return ids, target, in_words

  def _world(self, rng, step):
    config = self.config
    if rng.random() < config.sparse_share:
      return world.VARIANTS[config.variants[1]]
    dense = dataclasses.replace(
      world.VARIANTS[config.variants[0]], num_objects=config.dense_objects
    )
    share = min(1.0, step / max(1, config.ramp_steps))
    # A fifth of the clips stays between the variants in density.
    if share < 1.0 or rng.random() < 0.2:
      top = max(10, int(share * dense.num_objects[1]))
      return dataclasses.replace(dense, num_objects=(6, top))
    return dense

  def clip(self, rng, scene, text_share):
    """Returns the arrays of one clip, without the batch axis."""
    count = self.config.questions_per_clip
    length = self.config.question_length
    ids = np.full((count, length), self.pad, np.int32)
    target = np.zeros((count, length), bool)
    decisive = np.full((count, self.config.max_decisive), -1, np.int16)
    kind = np.full(count, -1, np.int8)
    in_words = np.zeros(count, bool)
    found = questions.sample_questions(
      rng, scene, count, self.config.kind_shares
    )
    for i, question in enumerate(found):
      ids[i], target[i], in_words[i] = self._question(
        rng, question, text_share, length, self.config.separator
      )
      tokens = question.tokens(scene)[: self.config.max_decisive]
      decisive[i, : len(tokens)] = tokens
      kind[i] = questions.KINDS.index(question.kind)
    times, head = map(float, range(scene.stage.num_frames)), {}
    if known := self.config.times:
      number = int(rng.integers(len(known)))
      times = known[number]
      head = {"head": np.int32(number), "times": np.float32(times)}
    drawn = [render.slots(scene, time) for time in times]
    sprite, corner, color = map(np.stack, zip(*drawn, strict=True))
    owners = world.token_owners(scene).reshape(-1)
    labels = np.where(
      owners[:, None] >= 0, scene.attributes[np.maximum(owners, 0)], -1
    )
    shown = {"sprite": sprite, "corner": corner, "color": np.uint8(color)}
    shown |= {"background": scene.background, "labels": np.int8(labels)}
    asked = {"ids": ids, "target": target, "decisive": decisive, "kind": kind}
    return shown | asked | {"in_words": in_words} | head

  def batch(self, step: int):
    """Returns a dict of arrays with a leading batch axis."""
    config = self.config
    rng = np.random.default_rng((config.seed, step))
    late = step >= config.num_steps // 2
    text_share = config.text_answer_share[int(late)]
    clips = []
    for _ in range(config.batch_size):
      scene = world.sample_scene(rng, self._world(rng, step))
      clips.append(self.clip(rng, scene, text_share))
    return stacked(clips) | self._told(rng, text_share)

  def _told(self, rng, text_share):
    """Returns the arrays of rows whose scene is told in words."""
    config, told = self.config, []
    shares, length = config.kind_shares, config.text_only_length
    while len(told) < config.text_only:
      scene = world.sample_scene(rng, world.VARIANTS[config.variants[1]])
      prefix = f"{PREFIX}{describe(scene)}\n"
      # Several of a scene: drawing one takes longer than asking about it.
      for question in questions.sample_questions(rng, scene, 4, shares):
        told.append(self._question(rng, question, text_share, length, prefix))
    ids, target, _ = zip(*told[: config.text_only], strict=True)
    return {"told_ids": np.stack(ids), "told_target": np.stack(target)}


_packer = functools.cache(Packer)  # A worker process keeps one.


def _serve_parent() -> None:
  """Makes this worker end with the trainer that waits for its batches, alone.

  A SIGTERM to all of a job's processes would else end it first, with a batch
  that the trainer needs to save and end.
  """
  decode_workers.ignore_signals()
  parent = multiprocessing.parent_process()
  threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent) -> None:
  parent.join()
  os._exit(0)


def _batch(config: PackingConfig, step: int) -> dict:
  return _packer(config).batch(step)


def batches(config, *, first_step: int, num_workers: int) -> Iterator[dict]:
  """Yields batch `first_step` and on, made by workers, or here without any."""
  # At most twice as many batches as workers are in flight.
  steps = range(first_step, config.num_steps)
  if not num_workers:
    yield from map(Packer(config).batch, steps)
    return
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(
    num_workers, context, _serve_parent
  )
  try:
    pending: collections.deque = collections.deque()
    for step in steps:
      pending.append(pool.submit(_batch, config, step))
      if len(pending) > 2 * num_workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except concurrent.futures.BrokenExecutor as error:
    raise errors.UserError(
      f"a process that makes batches was ended ({errors.one_line(error)}); give"
      " fewer config.pretrain.num_workers if memory ran out, then go on"
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)
