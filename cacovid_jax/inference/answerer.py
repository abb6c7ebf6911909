"""Questions about clips, answered from several shares of their tokens.

    from cacovid_jax.inference import answerer

    model = answerer.Answerer()  # The shipped model; or a directory.
    asked = model.ask("clip.mp4", "Which of these appears first?",
                      ("red moon", "blue star"), ratios=(1.0, 0.1),
                      method="uniform")
    for answer in asked.answers:
      print(answer.method, answer.kept, answer.text, answer.milliseconds)

Prompts, selections, programs and pictures are those of an evaluation. With
several devices on the mesh's axis `data`, each answers another question.
"""

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import decode_workers, letters, video, wording
from cacovid_jax.data import question as question_lib
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import programs as programs_lib

STYLES = ("video-r1", "videomme")
_MAX_NEW_TOKENS = 64
# First words of `engine.Engine.seconds` -> stage: "scores" is whatever a method
# reads, "answer" whatever happens inside the language model.
_STAGES = {
  "prompts": "embed", "policy": "scores", "vanilla": "scores",
  "select": "select", "answer": "answer",
}  # fmt: skip


class ClipAnswers(NamedTuple):
  """A question, its answers (one per ratio), and what they took.

  Attributes:
    milliseconds: "decode" (frames to pixels included) and "tower", which all
      answers share; each answer has its own "embed", "scores", "select" and
      "answer". Of all questions `together`, which were answered at once.
    warm_up: seconds of the run before the timed one, compilation included;
      None if there was none, and then the times include compilation.
    warnings: what is unusual about the clip, one line each.
  """

  question: question_lib.Question
  path: str
  clip: video.Probe
  grid: tuple[int, int, int]  # (T, H, W) of its `num_video` tokens.
  answers: tuple[engine_lib.AnswerResult, ...]
  milliseconds: Mapping[str, float]
  warm_up: float | None
  warnings: tuple[str, ...]
  together: int = 1

  num_video = property(lambda self: math.prod(self.grid))

  def total(self, answer: engine_lib.AnswerResult) -> float:
    """Returns the milliseconds from the file to an answer's text."""
    parts = (*self.milliseconds.values(), *answer.milliseconds.values())
    return float(sum(parts))


class Answerer(contextlib.ExitStack):
  """A loaded model that answers questions about clips, until it is closed.

  Another question of about the same length, about any clip, compiles nothing.
  """

  def __init__(
    self,
    model: str | os.PathLike | None = None,
    policy: str | os.PathLike | None = None,
    *,
    num_frames: int | None = None,
    max_new_tokens: int = 64,
    dtype: str = "float32",
    rule: str = letters.OWN,
    limits: video.Limits | None = None,
    at_once: int = 1,
  ):
    """Loads the weights.

    Args:
      model: Hugging Face checkpoint directory; None is the small model of the
        embedded benchmark, which comes with the package.
      policy: for the learned methods, see `loading.load_policy`; None is the
        shipped model's own policy, where there is one.
      num_frames: None takes the number in the checkpoint's files, or 32.
      max_new_tokens: longest answer.
      dtype: of weights and computation.
      rule: how a letter is taken from an answer, see `data.letters`.
      limits: caps on what is decoded.
      at_once: questions that `ask_all` shares among the devices.
    """
    if num_frames is not None:
      engine_lib.Settings(num_frames=num_frames)  # Refuses what is no number.
    changes = {
      "data.num_frames": num_frames or 0,
      "evals.max_new_tokens": max_new_tokens,
      "evals.rule": rule,
      "model.dtype": dtype,
      "model.path": "" if model is None else os.fspath(model),
    }
    if policy is not None:
      changes["evals.policies"] = (f"policy={os.fspath(policy)}",)
    config = config_lib.replace(base_config.get_config(), changes)
    self._load(config, limits, at_once)

  @classmethod
  def from_config(cls, config, limits: video.Limits | None = None, at_once=1):
    """Returns the answerer of `model`, `data`, `evals` and `mesh` of a config.

    Empty or 0, the model, the frames and new tokens are the usual ones, and
    `mesh.data` as many devices as there are questions `at_once`.
    """
    made = cls.__new__(cls)
    made._load(config, limits, at_once)
    return made

  def _load(self, config, limits, at_once):
    super().__init__()
    self.shipped = not config.model.path
    config = experiment_lib.with_shipped(config)
    left = max(jax.device_count() // max(config.mesh.model, 1), 1)
    size = config.mesh.data or min(at_once, left)
    errors.check(
      size <= at_once,
      f"config.mesh.data={size} devices share {at_once} question(s); lower it",
    )
    changes = {
      "mesh.data": size,
      "evals.batch_size": size,  # A question for each device of `data`.
      # Clips are named by whole paths: a user's own word, not a data set's.
      "data.root": os.path.abspath(os.sep),
      "data.media": "",
      "data.feature_cache": "",  # Times are those of encoding.
    }
    config = config_lib.replace(config, changes)
    experiment = experiment_lib.Experiment.from_config(config)
    self.experiment, self._limits, self._sources = experiment, limits, {}
    num_tokens = config.evals.max_new_tokens or _MAX_NEW_TOKENS
    rule, empty = config.evals.rule or letters.OWN, config.evals.empty_frames
    self.settings = engine_lib.Settings(
      config.data.num_frames, size, num_tokens, rule, empty_frames=empty
    )
    self._call = decode_workers.WAYS[config.data.decode]
    self.checkpoint = experiment.checkpoint
    self.policies = experiment.policies
    self.programs = programs_lib.Programs(
      self.checkpoint, num_tokens, experiment.mesh
    )

  def ask(
    self,
    path: str | os.PathLike, question: str, options: Sequence[str] = (),
    **how,
  ) -> ClipAnswers:  # fmt: skip
    """Returns the answers to one question about a video file, one per ratio.

    Args:
      path: of the file.
      question: text; without options it is the whole of the user's turn.
      options: choices without letters, of which the model is asked for one.
      **how: as of `ask_all`.
    """
    return self.ask_all([(path, question, options)], **how)[0]

  def ask_all(
    self,
    asked: Sequence[tuple[str | os.PathLike, str, Sequence[str]]],
    *,
    ratios: Sequence[float] = (0.1,),
    method: str = "cacovid",
    style: str = "video-r1",
    warm_up: bool = True,
  ) -> list[ClipAnswers]:
    """Returns the answers to several questions, in order.

    The devices of `data` answer as many at once, about clips of one grid.

    Args:
      asked: path, question and options of each, see `ask`.
      ratios: shares of the tokens to keep; 1.0 is vanilla, whatever the method.
      method: as in an evaluation, `name?option=value`.
      style: wording of a question with options, one of `STYLES`.
      warm_up: whether everything runs once before it is timed.
    """
    # All mistakes that can be told without running anything, first.
    questions = _distinct([as_question(*one, style=style) for one in asked])
    chosen = methods_lib.Method.parse(method)
    conditions = [
      methods_lib.Condition(chosen if ratio < 1 else None, ratio)
      for ratio in map(base.check_ratio, ratios)
    ]
    errors.check(conditions, "no ratio given; for example 0.1")
    if any(condition.method for condition in conditions):
      self._check(chosen)
    paths, groups = [os.fspath(one[0]) for one in asked], {}
    clips = {path: self._probe(path) for path in dict.fromkeys(paths)}
    grids = {path: self._grid(path) for path in clips}
    for place, path in enumerate(paths):
      groups.setdefault(grids[path], []).append(place)
    engines = {
      grid: self._engine(grid, [questions[n] for n in own], chosen, conditions)
      for grid, own in groups.items()
    }
    found, size = {}, self.settings.batch_size
    for grid, own in groups.items():
      for start in range(0, len(own), size):
        part = own[start : start + size]
        given = [questions[n] for n in part], conditions, warm_up
        seconds, first_run, answers = _run(engines[grid], *given)
        for place, own_answers in zip(part, answers, strict=True):
          told = questions[place], paths[place], clips[paths[place]]
          more = own_answers, seconds, first_run, self._warnings(grid, *told)
          found[place] = ClipAnswers(*told, grid, *more, together=len(part))
    return [found[place] for place in range(len(asked))]

  def _engine(self, grid, questions, method, conditions) -> engine_lib.Engine:
    """Returns what answers about clips of a grid, after a look at it."""
    source = self.source(grid)
    source.observe(methods_lib.wanted([method]))
    for question in questions:  # Among the warnings, not logged.
      source.damaged[question.video] = ""
    shared = {"policies": self.policies, "programs": self.programs}
    given = self.experiment, source, questions, self.settings
    engine = engine_lib.Engine.of(*given, more_follow=True, **shared)
    for condition in conditions:
      base.budget(source.grid, condition.ratio)
      if condition.method:
        engine.check(condition, source.grid)
    return engine

  def _warnings(self, grid, question, path, clip) -> tuple[str, ...]:
    """Returns what is unusual about a clip that was answered about."""
    source = self.source(grid)
    warnings = [f"{path}: {text}" for text in source[question.video].warnings]
    if clip.num_frames < (shown := self.settings.num_frames):
      warnings.append(
        f"{path} has {clip.num_frames} frame(s) and the model is shown"
        f" {shown}: frames repeat, as in the reference"
      )
    return tuple(warnings)

  def source(self, grid: tuple[int, int, int]):
    """Returns what encodes clips of a grid; made once."""
    if grid not in self._sources:
      how = {"limits": self._limits, "keep": self.settings.batch_size}
      found = clip_queue.open_queue(self.experiment, grid=grid, **how)
      self._sources[grid] = self.enter_context(found)
    return self._sources[grid]

  def _grid(self, path) -> tuple[int, int, int]:
    num_frames = self.settings.num_frames
    processor = clip_queue.read_processor(self.experiment)
    return processor.fixed_grid(num_frames) or processor.grid(
      num_frames, *self._call(video.frame_size, path, limits=self._limits)
    )

  def _probe(self, path) -> video.Probe:
    try:
      return self._call(video.probe, path, limits=self._limits)
    except video.VideoError as error:
      if error.reason != "missing":
        raise
      mend = "give the path of a video file"
      raise video.VideoError(path, "missing", mend=mend) from None

  def _check(self, method: methods_lib.Method) -> None:
    """Refuses methods that lack what they read."""
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies, which a clip of one's"
        " own does not tell; use another --methods"
      )
    if "other_scores" in method.needs:
      raise errors.UserError(
        f"{method.label} needs questions about several clips; run it with"
        " `python -m cacovid_jax.evaluate`"
      )
    if method.score_fields and not self.policies:
      mend = "give that of this model with --policy"
      if self.shipped:
        mend = "train one by `make quickstart`, then give"
        mend += " --policy=workdirs/quickstart"
      raise errors.UserError(
        f"{method.label} needs a trained policy; {mend}, or take a method"
        " without one, such as --methods=uniform"
      )


def as_question(
  path, text: str, options: Sequence[str] = (), *, style: str = "video-r1"
) -> question_lib.Question:
  """Returns the question about the clip at `path`; its answer is not known.

  Without options the text is asked as it is; with options, in the words of
  training ("video-r1") or of VideoMME's prompt.
  """
  if not (text := text.strip()):
    raise errors.UserError("the question is empty; give its text by --question")
  told = f"prompt style {style!r}: give {' or '.join(map(repr, STYLES))}"
  errors.check(style in STYLES, told)
  options = tuple(option.strip() for option in options)
  if options and (len(options) < 2 or not all(options)):
    raise errors.UserError(
      f"options {', '.join(map(repr, options))}: give at least two, none of"
      " them empty, or none at all"
    )
  try:
    # Bytes of a command line that are no UTF-8 come as half surrogate pairs.
    "".join((text, *options)).encode()
  except UnicodeEncodeError as error:
    told = f"the question {text[:40]!r} or an option of it is not UTF-8"
    raise errors.UserError(f"{told}; set the terminal to UTF-8") from error
  prompt, problem_type = text, question_lib.FREE_FORM
  if options:
    problem_type = question_lib.MULTIPLE_CHOICE
    lettered = wording.letter_options(options)
    prompt = wording.training_prompt(text, lettered, problem_type)
    if style == "videomme":
      prompt = wording.videomme_prompt(text, lettered)
  return question_lib.Question(
    id=os.path.basename(os.path.realpath(path)), video=video_name(path),
    question=text, options=options, answer="", problem_type=problem_type,
    prompt=prompt,
  )  # fmt: skip


def video_name(path: str | os.PathLike) -> str:
  """Returns a clip's path relative to the root of the file system.

  That is what a question calls the clip of a user, not of a data set.
  """
  path = os.path.relpath(os.path.realpath(path), os.path.abspath(os.sep))
  # The dot keeps a colon in a name from being read as a URL's.
  return os.path.join(".", path)


def _distinct(questions) -> list[question_lib.Question]:
  """Returns questions of different ids; what is drawn for them stays."""
  found, make = {}, dataclasses.replace
  for question in questions:
    name, count = question.id, 1
    while name in found:
      count += 1
      name = f"{question.id} ({count})"
    found[name] = make(question, id=name, stream=question.rng_id)
  return list(found.values())


def _run(engine, questions, conditions, warm_up: bool):
  """Returns (milliseconds, `warm_up`, answers by question) of `ClipAnswers`."""
  source, start = engine.source, time.perf_counter()
  # Decoding may find a fault that the table of frames did not show; here it
  # is told in full, where an evaluation only notes it.
  for question in questions:
    if source[question.video].fault:
      source.clear()
      source.load(question.video)
  if warm_up:
    for condition in conditions:
      engine.answers(questions, condition)
  first_run = time.perf_counter() - start if warm_up else None
  source.clear()
  source.seconds.clear()
  answers = [_timed(engine, questions, one) for one in conditions]
  seconds = {name: 1e3 * source.seconds[name] for name in ("decode", "tower")}
  return seconds, first_run, [*zip(*answers, strict=True)]


def _timed(engine, questions, condition) -> list[engine_lib.AnswerResult]:
  engine.seconds.clear()
  answers = engine.answers(questions, condition)
  milliseconds = collections.defaultdict(float)
  for name, seconds in engine.seconds.items():
    # Without a method, the prefill of the whole prompt is the answer's.
    whole = name == "vanilla" and condition.method is None
    stage = "answer" if whole else _STAGES.get(name.partition(" ")[0])
    if stage:
      milliseconds[stage] += 1e3 * seconds
  return [one._replace(milliseconds=dict(milliseconds)) for one in answers]
