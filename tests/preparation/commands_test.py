"""The commands about training data, from flags to files, in this process."""

import importlib
import json
import pathlib
import re
import runpy

import jax.numpy as jnp
import pytest
import tensorflow_datasets as tfds

from cacovid_jax import command, errors, files
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import readers
from cacovid_jax.data import tfds as tfds_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.preparation import blind_filter, encode_features, tfds_build
from tests.evals import tiny
from tests.preparation import blind_test

ROOT = pathlib.Path(__file__).parent.parent.parent
ROWS = [
  *blind_test.ROWS,
  blind_test.entry(20, "A picture?", "OCR", data_type="image"),
  blind_test.entry(21, "A chart?", "OCR", data_type="image", data_source=""),
  blind_test.entry(22, "Gone?", options=["A. x", "B. y"], path="gone.mp4"),
]
BAD = blind_test.entry(23, "Bad?", "guess")


def run(module, *words):
  return module.main(module.COMMAND.parse([module.__name__, *words]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Returns a media root with the rows' clips, but for one."""
  root = tmp_path_factory.mktemp("media")
  tiny.write_clip(root / "clips" / "3.mp4", seed=0, num_frames=2)
  for row in blind_test.ROWS[1:]:
    name = f"{row['problem_id']}.mp4"
    (root / "clips" / name).write_bytes(
      (root / "clips" / "3.mp4").read_bytes() + name.encode()
    )
  return root


def test_blind_filter(tmp_path, root, capsys):
  train = blind_test.write(tmp_path / "train.json", [*ROWS, BAD])
  out = tmp_path / "filtered.json"
  arguments = (
    f"--model={experiment_lib.SHIPPED_MODEL}",
    f"--train={train}",
    f"--media={root}",
    f"--out={out}",
    "--dtype=float32",
    "--batch_size=2",
    "--max_new_tokens=5",
    "--on_bad_row=skip",
  )
  with pytest.raises(errors.UserError) as error:
    run(blind_filter, *arguments)
  assert "1 of 6 clips are missing (1 of 6 questions)" in str(error.value)
  assert "with --on_missing=skip" in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
  arguments += ("--on_missing=skip",)
  run(blind_filter, *arguments)
  first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  run(blind_filter, *arguments)
  assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  assert set(first) == {
    "train.json",
    "filtered.json",
    "filtered.answers.jsonl",
    "filtered.report.json",
  }
  # Kept rows, from the answers alone: letters that differ, and words.
  asked = readers.read_video_r1(blind_test.write(tmp_path / "plain.json"))
  answers = blind_filter.ask(
    checkpoints.load(str(experiment_lib.SHIPPED_MODEL), jnp.float32),
    asked,
    blind_test.SETTINGS,
    path=tmp_path / "filtered.answers.jsonl",
  )
  wrong = [
    question.id
    for question, answer in zip(asked, answers, strict=True)
    if (answer[:1] if question.options else answer) != question.answer
  ]
  kept = [row["problem_id"] for row in json.loads(out.read_text())]
  assert [str(number) for number in kept] == wrong == ["3", "5", "9", "11"]
  report = json.loads((tmp_path / "filtered.report.json").read_text())
  by_source = {
    (row["source"], row["problem_type"]): (
      row["rows"],
      row["images_skipped"],
      row["clips_missing"],
    )
    for row in report["by_source"]
  }
  assert by_source == {
    ("drawn/short", "multiple choice"): (5, 0, 1),
    ("drawn/short", "free-form"): (1, 0, 0),
    ("drawn/short", "OCR"): (1, 1, 0),
    ("video-r1", "OCR"): (1, 1, 0),
    ("all", "all"): (8, 2, 1),
  }
  assert report["missing_clips"] == ["gone.mp4"]
  assert "problem_type" in report["bad_rows"][0]
  shown = capsys.readouterr().out
  assert "1 malformed rows left out" in shown
  told = "left out 1 questions about 1 missing clips, first: gone.mp4"
  # Before the first question is asked.
  assert shown.count(told) == 2 and shown.startswith(told)
  assert "right without video" in " ".join(shown.split())


@pytest.mark.parametrize(
  ("flag", "match"),
  [
    ("--out=", "which out: add --out"),
    ("--train=", "which train: add --train"),
    ("--model=", "which model: add --model"),
    ("--out={train}", "one of the files of --train"),
    ("--out={folder}/no/x.json", "no folder"),
    ("--batch_size=0", "batch_size is 0"),
  ],
)
def test_blind_filter_refuses(tmp_path, flag, match):
  train = blind_test.write(tmp_path / "train.json")
  with pytest.raises(errors.UserError, match=match):
    run(
      blind_filter,
      f"--model={experiment_lib.SHIPPED_MODEL}",
      f"--train={train}",
      f"--out={tmp_path / 'out.json'}",
      flag.format(train=train, folder=tmp_path),
    )
  assert not (tmp_path / "out.json").exists()


def test_tfds_build(tmp_path, root, capsys):
  train = blind_test.write(tmp_path / "train.json", ROWS)
  arguments = (f"--train={train}", f"--media={root}", f"--out={tmp_path}")
  with pytest.raises(errors.UserError, match="1 of 6 clips are missing") as e:
    run(tfds_build, *arguments)
  assert str(e.value).endswith("leave them out with --on_missing=skip")
  run(tfds_build, *arguments, "--on_missing=skip", "--embed")
  shown = capsys.readouterr().out
  assert "5 questions; left out 2 image rows, 0 malformed rows, 1 rows" in shown
  assert "missing: gone.mp4" in shown
  source = tfds.data_source("video_r1", data_dir=str(tmp_path), split="train")
  assert [row["id"] for row in source] == [b"3", b"5", b"8", b"9", b"11"]
  assert source[1]["clip"] == (root / "clips" / "5.mp4").read_bytes()
  got = tfds_lib.open_source(tmp_path, "train")
  assert list(got) == readers.read_video_r1(train)[:5]


def test_encode_features(tmp_path, root, capsys):
  train = blind_test.write(tmp_path / "train.json", ROWS[:3])
  config = tmp_path / "config.py"
  config.write_text(
    "from tests.training import tiny\n\n"
    "def get_config(arg=None):\n"
    "  config = tiny.config().copy_and_resolve_references()\n"
    "  config.unlock()\n"
    f"  config.model.path = {str(experiment_lib.SHIPPED_MODEL)!r}\n"
    f"  config.data.root = {str(root)!r}\n"
    f"  config.data.train_file = {str(train)!r}\n"
    "  config.data.num_frames = 2\n"
    "  config.rollout.reward = 'accuracy'\n"
    "  return config\n"
  )
  with pytest.raises(errors.UserError, match="says which feature_cache"):
    run(encode_features, f"--config={config}")
  for text in ("1", "a/b"):
    with pytest.raises(errors.UserError, match="give I/N"):
      run(encode_features, f"--config={config}", f"--shard={text}")
  features = tmp_path / "features"
  override = f"--config.data.feature_cache={features}"
  for index in (0, 1):
    run(encode_features, f"--config={config}", override, f"--shard={index}/2")
  shown = capsys.readouterr().out
  for count in (1, 2):
    assert (
      f"{count} clips, 0 were there, {count} encoded (0 with damaged pictures),"
      " 0 cannot be used"
    ) in shown
  assert len(list(features.rglob("*.features"))) == 3
  told = json.loads((features / "left_out.json").read_text())
  assert told["questions"] == 3 and told["missing_clips"] == {}


def test_a_second_process_with_the_same_share_is_refused(
  tmp_path, root, monkeypatch
):
  flags = [
    f"--config={ROOT / 'configs' / 'synthetic.py'}:debug",
    f"--feature_cache={tmp_path / 'features'}",
  ]
  refused = []

  def again(*given):
    if not refused:
      refused.append(given)
      for shard in ("1/2", "0/1"):  # Another share is another role.
        run(encode_features, *flags, f"--shard={shard}")

  monkeypatch.setattr(encode_features, "_encode", again)
  with pytest.raises(errors.UserError, match="share the work with --shard"):
    run(encode_features, *flags)
  assert refused and not (tmp_path / "features").exists()


def test_a_second_blind_filter_is_refused(tmp_path):
  train, out = blind_test.write(tmp_path / "train.json"), tmp_path / "out.json"
  with files.claim(out):
    with pytest.raises(errors.UserError, match="or give another --out"):
      run(
        blind_filter,
        f"--model={experiment_lib.SHIPPED_MODEL}",
        f"--train={train}",
        f"--out={out}",
      )
  assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_the_guides_commands_have_their_flags():
  guide = ROOT / "docs" / "training_data.md"
  blocks = re.findall(r"```bash\n(.*?)```", guide.read_text("utf-8"), re.S)
  names = []
  for block in blocks:
    python, dash, name, *words = block.split()
    assert (python, dash) == ("python", "-m")
    names.append(name.rpartition(".")[2])
    config = str(ROOT / "configs" / "llava_onevision.py")
    words = [word.replace("CONFIG", config) for word in words]
    args = importlib.import_module(name).COMMAND.parse([name, *words])
    assert not args.arguments
  assert names == ["blind_filter", "tfds_build", "encode_features"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["blind_filter", "tfds_build"])
def test_the_commands_are_found_where_they_were_before(name, monkeypatch):
  started = []
  monkeypatch.setattr(
    command.Command, "run", lambda self, main: started.append(self.doc)
  )
  runpy.run_module(f"cacovid_jax.data.{name}", run_name="__main__")
  (doc,) = started
  assert f"cacovid_jax.preparation.{name}" in doc
