"""What the YAML files of our tasks call, by dotted name.

Prompts and scores are those of our own evaluation; lmms-eval carries them. Both
rules of every benchmark are scored from the same answers, as two metrics.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks

# Metric -> rule; names of metrics must not hold a comma.
RULES = {"paper": "paper", "lmms_0_7_3": "lmms-0.7.3"}


def row(question, video: str, benchmark: str) -> dict[str, Any]:
  """Returns the row of a question about the clip at `video`."""
  return {
    "question_id": question.id,
    "benchmark": benchmark,
    "video": video,
    "question": question.question,
    "options": list(question.options),
    "answer": question.answer,
    "problem_type": question.problem_type,
    "duration": question.duration or "",
    "category": question.category or "",
    # Text: pairs of differing lengths do not make a column.
    "groups": json.dumps(question.groups),
    "prompt": question.prompt,
  }


def doc_to_visual(doc: Mapping[str, Any]) -> list[str]:
  """Returns the path of the row's clip."""
  return [doc["video"]]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs=None) -> str:
  """Returns the row's prompt, word for word."""
  del lmms_eval_specific_kwargs  # The prompt is complete.
  return doc["prompt"]


def process_results(doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns the scored answer for each metric."""
  alike = ("video", "question", "answer", "problem_type", "prompt")
  question = question_lib.Question(
    id=doc["question_id"],
    options=tuple(doc["options"]),
    duration=doc["duration"] or None,
    category=doc["category"] or None,
    groups=tuple(map(tuple, json.loads(doc["groups"]))),
    **{name: doc[name] for name in alike},
  )
  return _scored(question, results[0], doc["benchmark"])


def process_mlvu_test(doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns the same for a row of the data set `sy1998/MLVU_Test`."""
  question = question_lib.Question(
    id=str(doc.get("question_id") or doc["question"]),
    video=doc["video_name"],
    question=doc["question"],
    options=tuple(doc["candidates"]),
    answer=doc["answer"].strip(),
    category=doc["task_type"],
  )
  return _scored(question, results[0], "mlvu_test")


def aggregate(scored: Sequence[Mapping[str, Any]]) -> float:
  """Returns a benchmark's number from its scored answers, as it is printed.

  Of categories that nothing was asked of, MLVU's count 0 and MVBench's nothing.
  """
  task = benchmarks.task(scored[0]["benchmark"])
  by_category = collections.defaultdict(list)
  for one in scored:
    by_category[one["category"] if task.macro else ""].append(one["score"])
  names = task.macro or ("",)
  if task.macro_of_present:
    names = [name for name in names if name in by_category]
  return task.scale * _mean([_mean(by_category[name]) for name in names])


def _scored(question, text, benchmark) -> dict[str, dict[str, Any]]:
  out = {}
  for metric, rule in RULES.items():
    found = benchmarks.task(benchmark).score(question, text, rule=rule)
    out[metric] = {
      "question_id": question.id,
      "benchmark": benchmark,
      # What lmms-eval clusters its standard error by.
      "video": question.video,
      "duration": question.duration,
      "category": question.category,
      "answer": question.answer,
      "letter": found.letter,
      "fallback": found.fallback,
      "score": found.score,
    }
  return out


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values) if values else 0.0
