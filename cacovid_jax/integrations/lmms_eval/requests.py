"""From lmms-eval's requests (their arguments) to questions about clips."""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data.readers import mvbench
from cacovid_jax.inference import answerer


@dataclasses.dataclass(frozen=True)
class Asked:
  """One request."""

  place: str  # Task, split and row, to name it by.
  identity: str  # What our own evaluation calls the row, if that is known.
  video: str  # Path of the clip.
  prompt: str  # The user's text behind the clip, word for word.


def from_simple(context: str, visuals, place: str, name: str = "") -> Asked:
  """Returns the request of a text and a list of paths or pictures."""
  return Asked(place, name, _only_video(visuals, place), context)


def from_chat(messages: Sequence[Mapping], place: str, name: str = "") -> Asked:
  """Returns the request of a conversation of one turn.

  The prompt is what `from_simple` is given for the same row: the texts of the
  turn, put together. The clip comes first in it, wherever it stood.

  `messages` are [{"role": "user", "content": [{"type": "video", "url": path},
  {"type": "text", "text": ...}]}].
  """
  roles = [message.get("role") for message in messages or ()]
  if roles != ["user"]:
    raise errors.UserError(
      f"{place}: a conversation of {roles}; cacovid_jax answers one turn of the"
      " user, so take another form of the task"
    )
  content = messages[0]["content"]
  if isinstance(content, str):
    content = [{"type": "text", "text": content}]
  texts, videos = [], []
  for part in content:
    if part.get("type") == "text":
      texts.append(part["text"])
    elif part.get("type") == "video":
      videos.append(part.get("url"))
    else:
      raise errors.UserError(
        _NOT_A_VIDEO.format(place, f"content of type {part.get('type')!r}")
      )
  return Asked(place, name, _only_video(videos, place), "".join(texts))


_NOT_A_VIDEO = (
  "{}: the task hands over {}; cacovid_jax answers questions about one video"
  " file, so take a task of such questions"
)


def _only_video(visuals, place: str) -> str:
  visuals = list(visuals or ())
  what = f"{len(visuals)} visuals" if visuals else "no video"
  if len(visuals) == 1:
    if isinstance(visuals[0], str | os.PathLike):
      return os.fspath(visuals[0])
    what = f"a {type(visuals[0]).__name__}"
  raise errors.UserError(_NOT_A_VIDEO.format(place, what))


# The columns that name a row, joined by "_": those of VideoMME and MLVU, of
# EgoSchema, NExT-QA, LongVideoBench.
_NAMES = (("question_id",), ("question_idx",), ("video", "qid"), ("id",))
_MVBENCH = "mvbench_"
# MLVU's one file, whose rows are counted where they have no name.
_MLVU_FILE = "test-00000-of-00001"
_MLVU_COLUMNS = ("video_name", "task_type")


def identity(doc, task: str, number: int) -> str:
  """Returns the `Question.id` that `data.readers` give a row, "" if unknown.

  Methods that draw do so by it: the same tokens as in our own evaluation.
  `number` is the row's in its data set, from 0.
  """
  if not isinstance(doc, Mapping):
    return ""
  for columns in _NAMES:
    values = [doc.get(column) for column in columns]
    if None not in values:
      return "_".join(map(str, values))
  kind = task.removeprefix(_MVBENCH)
  if task.startswith(_MVBENCH) and kind in mvbench.TASKS:
    return f"{kind}:{number + 1}"
  if task.startswith("mlvu") and all(name in doc for name in _MLVU_COLUMNS):
    return f"{_MLVU_FILE}:{number + 1}"
  return ""


def as_questions(asked: Sequence[Asked]) -> list[question_lib.Question]:
  """Returns a question per request; equal requests give equal questions.

  A row keeps its own id, which what is drawn for it follows in any case, unless
  two different ones share it: then both are called by their places.
  """
  shared = collections.defaultdict(set)
  for one in asked:
    shared[one.identity].add((one.video, one.prompt))
  unique = {name for name, asked_for in shared.items() if len(asked_for) == 1}
  return [
    question_lib.Question(
      id=one.identity if one.identity in unique - {""} else one.place,
      stream=one.identity,
      video=answerer.video_name(one.video),
      question=one.prompt,
      answer="",
      prompt=one.prompt,
    )
    for one in asked
  ]


def max_new_tokens(gen_kwargs: Mapping, default: int, place: str) -> int:
  """Returns the longest answer that a task's generation arguments allow.

  `until` is not looked at, as in the paper's evaluator: an answer ends where
  the model ends it. Beams and draws are refused.
  """
  if gen_kwargs.get("do_sample"):
    raise errors.UserError(
      f"{place}: do_sample is set, but answers are greedy; add --gen_kwargs"
      " do_sample=False"
    )
  if (gen_kwargs.get("num_beams") or 1) > 1:
    raise errors.UserError(
      f"{place}: num_beams={gen_kwargs['num_beams']}, but answers are greedy;"
      " add --gen_kwargs num_beams=1"
    )
  length = gen_kwargs.get("max_new_tokens")
  length = default if length is None else length
  if not isinstance(length, int) or isinstance(length, bool) or length < 1:
    raise errors.UserError(
      f"{place}: max_new_tokens={length!r} is no length; at least 1"
    )
  return length
