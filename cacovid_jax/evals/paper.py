"""What the paper reports, and what of ours may be called the same.

Paper: https://arxiv.org/abs/2602.01649, its main table and its efficiency
table. The main table has 32 frames, greedy answers and the mean of four
benchmarks; a share is that of the model's own answers from all tokens.
Accuracies are per cent, times milliseconds.

The answers from all tokens move by points with the decoder, the prompt and the
versions of libraries. A compressed row says something of the paper's only where
they agree, so that this drift is checked first.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, hub

SOURCE = "arXiv 2602.01649, main table"
VANILLA = "vanilla"

# Benchmark -> (its name in tables, questions it asks).
BENCHMARKS = {
  "longvideobench": ("LongVideoBench", 1337),
  "mlvu_dev": ("MLVU dev", 2175),
  "mlvu_test": ("MLVU test", 502),
  "videomme": ("VideoMME", 2700),
}
# Columns of the table: benchmarks, and parts of one by duration.
COLUMNS = ("longvideobench", "mlvu_dev", "mlvu_test", "videomme/short",
           "videomme/medium", "videomme/long", "videomme")  # fmt: skip
AVERAGE = "average"
NUM_FRAMES = 32
RULE = "paper"


@dataclasses.dataclass(frozen=True)
class Model:
  """A base model of the table."""

  name: str
  config: str  # File and argument that train and evaluate it.
  # (width, layers, feed-forward width) of its decoder.
  sizes: tuple[int, int, int]
  family: str  # `model_type` of its checkpoints.
  # Whose chat template the paper's evaluation took; "" where both write the
  # same prompt.
  template: str = ""


MODELS = types.MappingProxyType({
  "ov7b": Model(
    "LLaVA-OneVision-7B", "configs/llava_onevision.py:size=7b",
    (3584, 28, 18944), "llava_onevision", "tokenizer",
  ),
  "qwen3b": Model(
    "Qwen2.5-VL-3B", "configs/qwen2_5_vl.py:size=3b",
    (2048, 36, 11008), "qwen2_5_vl",
  ),
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the main table."""

  model: str
  title: str  # The method as the paper calls it.
  method: str  # The method as `compressors.names()` calls it, or "vanilla".
  ratio: float
  average: float  # Mean of the four benchmarks.
  share: float  # Per cent of vanilla's average.
  # By column; empty where only averages are reported.
  scores: Mapping[str, float]

  def reported(self) -> dict[str, float]:
    """Returns every accuracy of the row, the average last."""
    return {**self.scores, AVERAGE: self.average}


def _row(model, title, ratio, *values) -> Row:
  *scores, average, share = values
  known = dict(zip(COLUMNS, scores, strict=bool(scores)))
  return Row(model, title, title.lower(), ratio, average, share, known)


# Method, ratio, `COLUMNS` where they are reported, average, share.
_TABLE = {
  "ov7b": (
    ("vanilla", 1.0, 56.4, 63.0, 47.7, 70.3, 56.8, 48.6, 58.6, 56.4, 100.0),
    ("FastV", 0.25, 53.5, 59.0, 41.7, 64.1, 53.1, 48.1, 55.1, 52.3, 92.7),
    ("VisionZip", 0.25, 56.0, 61.5, 43.5, 69.0, 55.0, 48.3, 57.4, 54.6, 96.8),
    ("DivPrune", 0.25, 56.4, 62.4, 44.1, 69.0, 54.6, 47.9, 57.1, 55.0, 97.5),
    ("PruneVID", 0.25, 56.1, 60.9, 45.4, 68.6, 56.7, 48.9, 58.0, 55.1, 97.7),
    ("FrameFusion", 0.25, 55.7, 61.1, 44.2, 68.7, 55.2, 48.2, 57.4, 54.6, 96.7),
    ("CaCoVID", 0.25, 56.2, 62.3, 46.3, 70.7, 56.3, 48.4, 58.5, 55.8, 98.9),
    ("CaCoVID", 0.20, 55.3, 98.1),
    ("CaCoVID", 0.15, 55.0, 97.5),
    ("FastV", 0.10, 47.6, 52.9, 35.2, 53.3, 48.0, 44.2, 48.5, 46.1, 81.6),
    ("VisionZip", 0.10, 48.9, 57.6, 41.5, 58.6, 52.3, 46.2, 52.4, 50.1, 88.8),
    ("DivPrune", 0.10, 53.3, 60.7, 44.9, 63.9, 52.9, 46.2, 54.3, 53.3, 94.5),
    ("PruneVID", 0.10, 54.4, 59.7, 42.7, 66.0, 52.4, 46.3, 54.9, 52.9, 93.8),
    ("FrameFusion", 0.10, 49.1, 56.5, 39.8, 59.6, 49.8, 45.1, 51.5, 49.2, 87.2),
    ("CaCoVID", 0.10, 55.2, 60.6, 44.6, 67.6, 54.9, 46.6, 56.3, 54.2, 96.1),
  ),
  "qwen3b": (
    ("vanilla", 1.0, 55.6, 100.0),
    ("CaCoVID", 0.25, 54.2, 97.5),
    ("CaCoVID", 0.20, 53.9, 96.9),
    ("CaCoVID", 0.15, 52.5, 94.4),
    ("CaCoVID", 0.10, 52.0, 93.4),
  ),
}
ROWS = tuple(_row(model, *row) for model in MODELS for row in _TABLE[model])
METHODS = tuple(
  dict.fromkeys(row.method for row in ROWS if row.method != VANILLA)
)
RATIOS = (0.25, 0.20, 0.15, 0.10)
# Options that the paper's rows have; other values make another method.
OPTIONS = types.MappingProxyType(
  {"cacovid": dict(importance_ratio=0.5, max_frame_share=1.5, budget="frames")}
)

# Milliseconds on the paper's accelerator at 25 %: LLaVA-OneVision-7B's prefill
# and, by method, the time to choose the tokens.
EFFICIENCY_SOURCE = "arXiv 2602.01649, efficiency table"
EFFICIENCY_MODEL, EFFICIENCY_RATIO = "ov7b", 0.25
VANILLA_PREFILL_MS, PREFILL_MS = 200.4, 53.2
COMPRESSION_MS = {"divprune": 134.3, "prunevid": 34.1, "cacovid": 11.2}


def model_of(config: Any) -> str | None:
  """Returns the key of `MODELS` of a base model's config; None for others."""
  text, family = config.text, config.to_hf()["model_type"]
  sizes = (text.hidden_size, text.num_layers, text.intermediate_size)
  known = {(model.sizes, model.family): key for key, model in MODELS.items()}
  return known.get((sizes, family))


def row(model: str | None, method: str, ratio: float) -> Row | None:
  """Returns the paper's row of a method at a ratio, if it has one."""
  for found in ROWS:
    same = (found.model, found.method) == (model, method)
    if same and (method == VANILLA or abs(found.ratio - ratio) < 1e-9):
      return found
  return None


def is_method(method: Any) -> bool:
  """Returns whether a `methods.Method` is the paper's method of its label."""
  compressor = method.compressor
  known = OPTIONS.get(compressor.name, {})
  return method.label == compressor.name and all(
    known.get(key) == value for key, value in compressor.options.items()
  )


def column_title(column: str) -> str:
  """Returns what a column is called: "VideoMME short"."""
  benchmark, _, part = column.partition("/")
  return " ".join([BENCHMARKS[benchmark][0], part]).strip()


def check_tolerance(tolerance: float) -> float:
  """Returns the points that may lie between two runs of one thing, checked."""
  if not 0 <= tolerance < float("inf"):
    raise errors.UserError(
      f"tolerance {tolerance:g}: give a number of points from 0 up, such as 1"
    )
  return tolerance


def compare(
  own: Mapping[str, float], reported: Mapping[str, float], tolerance: float
) -> dict[str, dict[str, Any]]:
  """Returns, by column that both have: own, paper, difference and within."""
  out = {}
  for column, value in reported.items():
    if column not in own:
      continue
    # Tables have one decimal; so has what they are compared by.
    difference = round(round(own[column], 1) - value, 1)
    out[column] = {
      "own": round(own[column], 4),
      "paper": value,
      "difference": difference,
      "within": abs(difference) <= tolerance,
    }
  return out


def drift(
  model: str | None, own: Mapping[str, float], tolerance: float
) -> dict[str, Any]:
  """Returns the `drift` section of results.json."""
  known = row(model, VANILLA, 1.0)
  columns = compare(own, known.reported(), tolerance) if known else {}
  differences = [abs(entry["difference"]) for entry in columns.values()]
  return {
    "model": model and MODELS[model].name,
    "source": SOURCE,
    "tolerance": tolerance,
    "columns": columns,
    "worst": max(differences, default=None),
  }


def reproduced(
  found: Mapping[str, Any],
  reported: Row | None,
  own: Mapping[str, float],
  obstacles: Sequence[str] = (),
) -> bool | str:
  """Returns whether a row says what the paper's says: True, False, or why not.

  `obstacles` make any comparison void: other settings, questions not asked.
  """
  if reported is None:
    return "not in the paper"
  if obstacles:
    return obstacles[0]
  tolerance = found["tolerance"]
  if found["worst"] is None:
    return "no column of the paper's vanilla was measured"
  if (worst := found["worst"]) > tolerance:
    return f"vanilla off by {worst:.1f} points (tolerance {tolerance:.1f})"
  columns = compare(own, reported.reported(), tolerance)
  return bool(columns) and all(entry["within"] for entry in columns.values())


def obstacles(
  config: Any, parts: Sequence[Any], absent: Sequence[str], model: str | None
) -> list[str]:
  """Returns what makes a comparison with the paper void, in words.

  The config is that of any part's evaluation; parts are `combined.Part`.
  """
  found = []
  if absent:
    titles = ", ".join(BENCHMARKS[name][0] for name in absent)
    found.append(f"not asked: {titles}")
  for part in parts:
    (title, expected), asked = BENCHMARKS[part.name], len(part.questions)
    if asked != expected:
      found.append(f"{asked} of {expected} questions of {title}")
    if lost := sum(entry["questions"] for entry in part.out["unreadable"]):
      found.append(f"clips of {lost} questions of {title} cannot be used")
  num_frames, evals = config.data.num_frames, config.evals
  if num_frames != NUM_FRAMES:
    found.append(f"{num_frames} frames instead of {NUM_FRAMES}")
  found += _other_pixels(config)
  template = model and MODELS[model].template
  if template and evals.template != template:
    found.append(
      f"prompts by the {evals.template or 'default'} chat template instead"
      f" of the {template}'s"
    )
  if evals.max_new_tokens:
    found.append(f"answers of at most {evals.max_new_tokens} tokens")
  if (evals.rule or RULE) != RULE:
    found.append(f"letters taken by the rule {evals.rule}")
  return found


def _other_pixels(config) -> list[str]:
  """Returns an obstacle if frames of Qwen2.5-VL have other bounds."""
  path, data = config.model.path, config.data
  if not (data.min_pixels or data.max_pixels):
    return []
  found = checkpoints.make_model(checkpoints.load_config(path))
  found = found.read_processor(hub.directory(path))
  own, papers = (
    f"{each.min_pixels} to {each.max_pixels}"
    for each in (
      found.with_paper_bounds(data.min_pixels, data.max_pixels),
      found.with_paper_bounds(),
    )
  )
  if own == papers:
    return []
  return [f"frames of {own} pixels instead of {papers}"]
