"""What training does not see of its question files, told and kept."""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping

from cacovid_jax import errors, files
from cacovid_jax.data import readers

FILE = "left_out.json"
_SHOWN = 5


@dataclasses.dataclass
class SkippedRows:
  """Rows and clips that are not trained on."""

  num_questions: int = 0  # That are.
  report: readers.Report = dataclasses.field(default_factory=readers.Report)
  # Clips that are not there -> questions lost.
  missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def lines(self) -> list[str]:
    """Returns one line for each kind, none where nothing was left out."""
    report, found = self.report, []
    if report.num_images:
      sources = collections.Counter()
      for (source, _), count in report.images.items():
        sources[source] += count
      told = ", ".join(f"{name} {n}" for name, n in sorted(sources.items()))
      found.append(f"left out {report.num_images} image rows: {told}")
    if report.bad_rows:
      found.append(
        f"left out {len(report.bad_rows)} bad rows, first: {report.bad_rows[0]}"
      )
    if self.missing:
      found.append(
        f"left out {sum(self.missing.values())} questions about"
        f" {len(self.missing)} missing clips, first:"
        f" {', '.join(list(self.missing)[:_SHOWN])}"
      )
    return found

  def write(self, directory) -> None:
    """Writes every bad row and every clip into `FILE` of a folder."""
    images = sorted(self.report.images.items())
    out = {
      "questions": self.num_questions,
      "images": [
        {"source": source, "problem_type": kind, "rows": count}
        for (source, kind), count in images
      ],
      "bad_rows": [str(row) for row in self.report.bad_rows],
      "missing_clips": dict(self.missing),
    }
    os.makedirs(directory, exist_ok=True)
    # Processes that share a folder write the same, each by itself.
    files.write_json(os.path.join(directory, FILE), out)

  def check(self, directory) -> None:
    """Refuses to go on with a run, of that folder, that saw other questions.

    Which question stands in which step depends on all of them. Nothing is known
    where there is no `FILE`.
    """
    path = os.path.join(directory, FILE)
    try:
      with open(path, encoding="utf-8") as f:
        before = json.load(f)
      then = before["questions"], before["missing_clips"]
    except FileNotFoundError:
      return
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f"{path}: not readable ({error}); delete it if the questions and clips"
        " are those that the run began with"
      ) from error
    if then != (self.num_questions, dict(self.missing)):
      raise errors.UserError(
        f"{path}: the run began with {then[0]} questions and {len(then[1])}"
        f" missing clips, and now there are {self.num_questions} and"
        f" {len(self.missing)}; bring back the files as they were or use"
        " another workdir"
      )
