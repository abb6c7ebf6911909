"""One question about one clip, answered from several shares of its tokens.

    from cacovid_jax.inference import answerer

    model = answerer.Answerer()  # The shipped model; or a directory.
    asked = model.ask("clip.mp4", "Which of these appears first?",
                      ("red moon", "blue star"), ratios=(1.0, 0.1),
                      method="uniform")
    for answer in asked.answers:
      print(answer.method, answer.kept, answer.text, answer.milliseconds)

Prompts, selections, programs and pictures are those of an evaluation.
"""

import collections
import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
      "answer".
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
    self._load(config_lib.replace(base_config.get_config(), changes), limits)

  @classmethod
  def from_config(cls, config, limits: video.Limits | None = None):
    """Returns the answerer of `model`, `data`, `evals` and `mesh` of a config.

    Empty or 0, the model, the frames and new tokens are the usual ones.
    """
    made = cls.__new__(cls)
    made._load(config, limits)
    return made

  def _load(self, config, limits):
    super().__init__()
    self.shipped = not config.model.path
    config = experiment_lib.with_shipped(config)
    changes = {
      # Clips are named by whole paths: a user's own word, not a data set's.
      "data.root": os.path.abspath(os.sep),
      "data.media": "",
      "data.feature_cache": "",  # Times are those of encoding.
    }
    experiment = experiment_lib.Experiment.from_config(
      config_lib.replace(config, changes), split=""
    )
    self.experiment, self._limits, self._sources = experiment, limits, {}
    num_tokens = config.evals.max_new_tokens or _MAX_NEW_TOKENS
    self.settings = engine_lib.Settings(
      config.data.num_frames, 1, num_tokens, config.evals.rule or letters.OWN,
      empty_frames=config.evals.empty_frames,
    )  # fmt: skip
    self._call = decode_workers.WAYS[config.data.decode]
    self.checkpoint = experiment.checkpoint
    self.policies = experiment.policies
    self.programs = programs_lib.Programs(
      self.checkpoint, num_tokens, experiment.mesh
    )

  def ask(
    self,
    path: str | os.PathLike,
    question: str,
    options: Sequence[str] = (),
    *,
    ratios: Sequence[float] = (0.1,),
    method: str = "cacovid",
    style: str = "video-r1",
    warm_up: bool = True,
  ) -> ClipAnswers:
    """Returns the answers to one question about a video file, one per ratio.

    Args:
      path: of the file.
      question: text; without options it is the whole of the user's turn.
      options: choices without letters, of which the model is asked for one.
      ratios: shares of the tokens to keep; 1.0 is vanilla, whatever the method.
      method: as in an evaluation, `name?option=value`.
      style: wording of a question with options, one of `STYLES`.
      warm_up: whether everything runs once before it is timed.
    """
    # All mistakes that can be told without running anything, first.
    asked = as_question(path, question, options, style=style)
    chosen = methods_lib.Method.parse(method)
    conditions = [
      methods_lib.Condition(chosen if ratio < 1 else None, ratio)
      for ratio in map(base.check_ratio, ratios)
    ]
    if not conditions:
      raise errors.UserError("no ratio given; for example 0.1")
    if any(condition.method for condition in conditions):
      self._check(chosen)
    clip = self._probe(path)
    source = self.source(self._grid(path))
    source.observe(methods_lib.wanted([chosen]))
    source.damaged[asked.video] = ""  # Among the warnings below, not logged.
    engine = engine_lib.Engine.of(
      self.experiment, source, [asked], self.settings, policies=self.policies,
      programs=self.programs, more_follow=True,
    )  # fmt: skip
    for condition in conditions:
      base.budget(source.grid, condition.ratio)
      if condition.method:
        engine.check(condition, source.grid)
    start = time.perf_counter()
    # Decoding may find a fault that the table of frames did not show; here it
    # is told in full, where an evaluation only notes it.
    if source[asked.video].fault:
      source.clear()
      source.load(asked.video)
    if warm_up:
      for condition in conditions:
        engine.answer(asked, condition)
    first_run = time.perf_counter() - start
    source.clear()
    source.seconds.clear()
    answers = [_timed(engine, asked, condition) for condition in conditions]
    warnings = [f"{path}: {text}" for text in source[asked.video].warnings]
    if clip.num_frames < (shown := self.settings.num_frames):
      warnings.append(
        f"{path} has {clip.num_frames} frame(s) and the model is shown"
        f" {shown}: frames repeat, as in the reference"
      )
    return ClipAnswers(
      question=asked, path=os.fspath(path), clip=clip, grid=source.grid,
      answers=tuple(answers),
      milliseconds={k: 1e3 * source.seconds[k] for k in ("decode", "tower")},
      warm_up=first_run if warm_up else None, warnings=tuple(warnings),
    )  # fmt: skip

  def source(self, grid: tuple[int, int, int]):
    """Returns what encodes clips of a grid; made once."""
    if grid not in self._sources:
      found = clip_queue.open_queue(
        self.experiment, limits=self._limits, keep=1, grid=grid
      )
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
  if style not in STYLES:
    raise errors.UserError(
      f"prompt style {style!r}: give {' or '.join(map(repr, STYLES))}"
    )
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


def _timed(engine, question, condition) -> engine_lib.AnswerResult:
  engine.seconds.clear()
  answer = engine.answer(question, condition)
  milliseconds = collections.defaultdict(float)
  for name, seconds in engine.seconds.items():
    stage = _STAGES.get(name.partition(" ")[0])
    # Without a method, the prefill of the whole prompt is the answer's.
    if name == "vanilla" and condition.method is None:
      stage = "answer"
    if stage:
      milliseconds[stage] += 1e3 * seconds
  return answer._replace(milliseconds=dict(milliseconds))
