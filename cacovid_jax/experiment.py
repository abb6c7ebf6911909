"""From a config to what a command needs: the only constructor.

Parts are made when they are first asked for, so that a command which only
counts reads no weight.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cacovid_jax import config as config_lib
from cacovid_jax import config_limits, errors, terminal
from cacovid_jax.data import chat_template as chat_template_lib
from cacovid_jax.data import left_out as left_out_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import readers
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, hub, processor_files
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import loading

_ASSETS = pathlib.Path(__file__).parent / "assets"
SHIPPED_MODEL = _ASSETS / "base_model"
SHIPPED_POLICY = _ASSETS / "policy"
# What a part of an experiment depends on; a model stays on its mesh.
_PARTS = {
  "mesh": ("mesh",),
  "loaded": ("mesh", "model"),
  "checkpoint": ("mesh", "model", "evals.template"),
  "policies": ("mesh", "model", "evals.template", "evals.policies"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """What a config describes."""

  config: Any  # Locked; see `base_config`.
  workdir: pathlib.Path | None = None  # Of files of the run; None for nowhere.
  shard: tuple[int, int] = (0, 1)  # Process i of n that share the work.
  # Key of what the `data` axis of the mesh shares: videos of a training step,
  # or questions of a batch; "" is a batch of one question.
  split: str = "evals.batch_size"

  @classmethod
  def from_config(cls, config, workdir=None, *, checkpoint=None, **fields):
    """Returns an experiment; looks at the config and reads nothing.

    Keys that the config leaves out have defaults; a `checkpoint` is the base
    model, instead of config.model.path; `fields` are `shard` and `split`.
    """
    config = config_lib.complete(config.copy_and_resolve_references()).lock()
    config_limits.check(config)
    made = cls(config, workdir and pathlib.Path(workdir), **fields)
    if checkpoint is not None:
      # Where a cached property looks first.
      made.__dict__["loaded"] = checkpoint
    return made

  def replace(self, changes, workdir=None) -> "Experiment":
    """Returns the experiment with {key: value} changed, loaded parts shared."""
    config = config_lib.replace(self.config, changes)
    workdir = self.workdir if workdir is None else pathlib.Path(workdir)
    made = dataclasses.replace(self, config=config, workdir=workdir)
    made.adopt(self)
    return made

  def adopt(self, other: "Experiment") -> None:
    """Takes over the parts that another one has made, where both are alike."""
    for name, keys in _PARTS.items():
      own, others = (
        [config_lib.value_of(one.config, key) for key in keys]
        for one in (self, other)
      )
      if name in other.__dict__ and own == others:
        self.__dict__[name] = other.__dict__[name]

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices of config.mesh, after a look at what they share."""
    share = config_lib.value_of(self.config, self.split) if self.split else 1
    data, model = self.config.mesh.data, self.config.mesh.model
    if not data and self.split != "videos_per_step":
      left = max(jax.device_count() // max(model, 1), 1)
      data = max(n for n in range(1, left + 1) if share % n == 0)
    mesh = mesh_lib.make_mesh(data, model)
    mesh_lib.check_map(self.config.mesh.map, mesh)
    devices = mesh.shape["data"]
    if share < 1 or share % devices:
      raise errors.UserError(
        f"config.{self.split or 'mesh.data'}={share} does not divide among the"
        f" {devices} devices of the data axis; use a multiple of it, or set"
        " config.mesh.data"
      )
    return mesh

  @functools.cached_property
  def loaded(self) -> checkpoints.Checkpoint:
    """The frozen base model, on the mesh, with its default chat template."""
    model = self.config.model
    if not model.path:
      raise errors.UserError(
        "config.model.path is empty; name the checkpoint directory of a"
        " LLaVA-OneVision, a Qwen2.5-VL or a Qwen3-VL"
      )
    # On one device that nothing is placed on, arrays go where they are used.
    alone = self.mesh.size == 1 and self.split != "videos_per_step"
    less = "set config.mesh.model=2 to split them, or config.model.dtype"
    with errors.during("loading the weights", f"{less}=bfloat16"):
      checkpoint = checkpoints.load(
        model.path,
        dtype=jnp.dtype(model.dtype),
        # Each device reads its own part: none ever holds the whole model.
        mesh=None if alone else self.mesh,
        backend=model.backend,
        layers=model.layers,
      )
    if checkpoint.tokenizer is None:
      raise errors.UserError(
        f"{model.path}: no tokenizer.json; give a complete checkpoint directory"
      )
    made = with_options(checkpoint.model, model)
    return dataclasses.replace(checkpoint, model=made)

  @functools.cached_property
  def checkpoint(self) -> checkpoints.Checkpoint:
    """The base model with the chat template of config.evals."""
    config = self.config
    return with_template(self.loaded, config.model.path, config.evals.template)

  @functools.cached_property
  def policies(self) -> dict[str, loading.LoadedPolicy]:
    """Name -> policy; plain `cacovid` follows the first one."""
    paths = self.policy_paths
    return {k: loading.load_policy(paths[k], self.checkpoint) for k in paths}

  @property
  def policy_paths(self) -> dict[str, str]:
    """Name -> policy, of config.evals.policies; the first is the main one."""
    out = {}
    for number, text in enumerate(map(str, self.config.evals.policies)):
      name, path = f"policy{number or ''}", text
      if "=" in text.partition("?")[0]:  # Behind it stands ?module=NAME.
        name, _, path = text.partition("=")
      out[name] = path
    return out


def with_options(model, options):
  """Returns a `VideoLLM` with what config.model asks of it, or a UserError."""
  model = model.with_outer_vision_tags(options.outer_vision_tags)
  return model.with_float8_tower(options.float8_tower)


def with_template(checkpoint, directory, template) -> checkpoints.Checkpoint:
  """Returns a checkpoint that writes prompts by the chat template asked for.

  "" or "processor" is the default that it has as loaded from the directory: the
  processor's, or where there is none the tokenizer's. "tokenizer" takes that of
  tokenizer_config.json and gives it plain texts, as the paper's evaluation.
  """
  if template in ("", "processor"):
    return checkpoint
  directory = hub.directory(directory)
  if not chat_template_lib.has_tokenizer_template(directory):
    raise errors.UserError(
      f"{directory}: tokenizer_config.json has no chat_template, which"
      " template=tokenizer takes; copy that file from the checkpoint's origin,"
      " or use template=processor"
    )
  make = tokenizer_lib.Tokenizer.from_directory
  return dataclasses.replace(
    checkpoint, tokenizer=make(directory, template=template)
  )


def with_shipped(config) -> Any:
  """Returns the config with the shipped model where it names none.

  And with that one's policy, or one among the named model's own weights, if it
  names no policy; and the number of frames that the model's files say, for 0.
  """
  path = config.model.path or os.fspath(SHIPPED_MODEL)
  changes = {"model.path": path}
  policy = config.model.path or os.fspath(SHIPPED_POLICY)
  if not config.evals.policies and loading.has_policy(policy):
    changes["evals.policies"] = (f"policy={policy}",)
  if not config.data.num_frames:
    folder = hub.directory(path)
    changes["data.num_frames"] = processor_files.default_num_frames(folder)
  return config_lib.replace(config, changes)


def read_questions(
  config, workdir=None, *, resumes=True, left_out=None
) -> Sequence:
  """Returns the training `Question`s of config.data, whose clips are there.

  What is not, goes into `left_out`, `data.left_out.SkippedRows`, if given.
  With a workdir, what is left out is printed, one line for each kind, and
  listed in its `left_out.json`; a run that resumes refuses other rows than the
  workdir's.
  """
  left_out = left_out or left_out_lib.SkippedRows()
  rows = _with_clips(config, _read_rows(config, left_out.report), left_out)
  left_out.num_questions = len(rows)
  if workdir is not None:
    if resumes:
      left_out.check(workdir)
    if jax.process_index() == 0:
      for line in left_out.lines():
        terminal.tell(line)
      left_out.write(workdir)
  return rows


def media_root(config) -> str:
  """Returns the folder that the clips of config.data lie below."""
  return os.path.join(config.data.root, config.data.media)


def _read_rows(config, report) -> Sequence[question_lib.Question]:
  data = config.data
  if not data.root or not os.path.isdir(data.root):
    raise errors.UserError(
      f"config.data.root={data.root!r} is no folder; give the one that holds"
      " the questions and clips (cacovid_jax.prepare makes one)"
    )
  if data.tfds:
    # Dear to import, and most runs read other files.
    from cacovid_jax.data import tfds as tfds_lib

    folder = os.path.join(data.root, data.tfds)
    return tfds_lib.open_source(folder, data.train_split)
  root = media_root(config)
  options = {"on_bad_row": data.on_bad_row, "report": report}
  if data.reader == "own":
    return readers.read_own(data.root, root, split=data.train_split, **options)
  return readers.read_video_r1(config_lib.train_files(config), root, **options)


def _with_clips(config, rows, left_out):
  """Returns the rows whose clips are there; others are an error or noted."""
  root, names = media_root(config), [row.video for row in rows]
  missing = left_out.missing = readers.find_missing(
    names,
    root,
    on_missing=config.data.on_missing,
    mend="leave them out with config.data.on_missing=skip",
  )
  if not missing:
    return rows
  found = [place for place, name in enumerate(names) if name not in missing]
  if config.data.tfds:
    return rows.take(found)
  return [rows[place] for place in found]
