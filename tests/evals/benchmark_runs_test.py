"""Every benchmark from its released folder to results.json."""

import json
import pathlib
import shutil

import pytest

from cacovid_jax import errors, evaluate, terminal
from cacovid_jax.evals import benchmarks, evaluation
from cacovid_jax.inference import prompts as prompts_lib
from tests.data import benchmark_files
from tests.evals import tiny

DAMAGED = (
  pathlib.Path(__file__).parents[1] / "data" / "cases" / "middle_zeroed.mp4"
)
NAMES = tuple(benchmark_files.LAYOUTS)


pytestmark = pytest.mark.usefixtures("one_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("benchmarks")
  found = {}

  def make(name):
    if name not in found:
      found[name] = benchmark_files.write(name, root / name)
    return found[name]

  return make


@pytest.fixture(autouse=True)
def one_length(monkeypatch):
  """Pads all prompts to one length, so that the runs share their programs."""
  monkeypatch.setattr(prompts_lib, "_MULTIPLE", 256)


@pytest.fixture(scope="module")
def request_of(checkpoint_dir, folder):
  def make(name, workdir, **changes):
    fields = dict(
      data=folder(name).data_dir,
      benchmark=name,
      checkpoint=checkpoint_dir,
      methods=("uniform",),
      ratios=(0.25,),
      batch_size=4,
      max_new_tokens=2,
      select_on="validation",
    )
    return tiny.experiment(workdir, **fields | changes)

  return make


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_evaluated(name, request_of, folder, tmp_path):
  out = evaluation.evaluate(request_of(name, tmp_path))
  fixture, task = folder(name), benchmarks.task(name)
  assert json.loads((tmp_path / "results.json").read_text()) == out
  assert (out["benchmark"], out["split"]) == (name, fixture.split)
  assert (out["metric"], out["scale"]) == (task.metric, task.scale)
  assert out["macro"] == list(task.macro)
  assert (out["rule"], out["left_out"], out["unreadable"]) == ("paper", {}, [])
  assert out["num_clips"] == len(fixture.clips)
  # What the answers say is scored as the task scores it, question by question.
  questions = {
    question.id: question
    for question in benchmarks.load(fixture.root, benchmark=name).questions
  }
  lines = (tmp_path / "answers.jsonl").read_text().splitlines()[1:]
  records = [json.loads(line) for line in lines]
  assert len(records) == 2 * fixture.num_questions
  for record in records:
    question = questions[record["question"]]
    scored = task.score(question, record["text"])
    assert (record["score"], record["letter"]) == scored[:2]
    assert record.get("fallback", False) == scored.fallback
  for spec, cell in [
    ("vanilla", out["vanilla"]),
    ("uniform", out["methods"]["uniform"]["0.25"]),
  ]:
    mine = [record for record in records if record["method"] == spec]
    assert cell["n"] == len(mine) == fixture.num_questions
    guesses = sum(record.get("fallback", False) for record in mine)
    assert cell.get("num_fallbacks", 0) == guesses
    groups = {}
    for record in mine:
      category = questions[record["question"]].category
      groups.setdefault(category, []).append(record["score"])
    means = [sum(scores) / len(scores) for scores in groups.values()]
    if task.macro:
      wanted = sum(means) / len(task.macro)
    else:
      wanted = sum(record["score"] for record in mine) / len(mine)
    assert cell["accuracy"] == pytest.approx(wanted, abs=1e-6)
    assert set(cell["by_category"]) == set(groups) - {None}
    assert set(cell["by_duration"]) == set(task.duration_groups)


def test_missing_clips_are_named_before_anything_is_asked(
  request_of, folder, tmp_path
):
  fixture = benchmark_files.write("videomme", tmp_path / "data")
  (fixture.root / fixture.clips[1]).unlink()
  workdir = tmp_path / "work"
  request = request_of("videomme", workdir, data=fixture.data_dir)
  message = (
    r"1 of 3 clips are missing \(2 of 6 questions\), first: data/clip_1.mp4;"
    ".* on_missing=count"
  )
  with pytest.raises(errors.UserError, match=message):
    evaluation.evaluate(request)
  assert not workdir.exists()
  # Counted, they are wrong whatever the others are, and listed.
  out = evaluation.evaluate(
    request_of("videomme", workdir, data=fixture.data_dir, on_missing="count")
  )
  assert out["vanilla"]["n"] == 6
  assert out["vanilla"]["by_duration"]["medium"] == {"accuracy": 0, "n": 2}
  (entry,) = out["unreadable"]
  assert (entry["video"], entry["questions"]) == ("data/clip_1.mp4", 2)
  with pytest.raises(errors.UserError, match="must be one of raise, count"):
    request_of("videomme", workdir, on_missing="skip")


def test_damaged_pictures_are_told_everywhere(request_of, tmp_path, caplog):
  """In the log, the table, frames.jsonl, results.json and the report."""
  fixture = benchmark_files.write("nextqa", tmp_path / "data")
  name = fixture.clips[1]
  # Of 80 pictures, 20 to 68 lose their data or what they are predicted from.
  shutil.copy(DAMAGED, fixture.root / name)
  cache = {"data.feature_cache": str(tmp_path / "cache")}
  options = {"data": fixture.data_dir, **cache}
  out = evaluation.evaluate(request_of("nextqa", tmp_path / "w", **options))
  (entry,) = map(dict, out["damaged"])
  # Shown are 0, 26, 52 and 79.
  assert entry.pop("replaced") + entry.pop("damaged") == 2
  assert entry == {"video": name, "questions": 3, "lost": 40}
  assert out["unreadable"] == []
  told = f"{name}: 40 pictures cannot be decoded, "
  caveat, *_ = evaluation.caveats(out)
  assert caveat.startswith(told)
  assert [r.message for r in caplog.records if told in r.message] == [caveat]
  lines = (tmp_path / "w" / "frames.jsonl").read_text().splitlines()[1:]
  lost = {line["video"]: line.get("lost") for line in map(json.loads, lines)}
  assert lost == dict.fromkeys(fixture.clips) | {name: 40}
  page = (tmp_path / "w" / "report.html").read_text()
  assert "Clips with damaged pictures" in page and f"<td>{name}</td>" in page
  # Features on disk tell as much.
  request = request_of("nextqa", tmp_path / "again", **options)
  assert evaluation.evaluate(request)["damaged"] == out["damaged"]
  strict = {"data.max_replaced": 0.2}
  request = request_of("nextqa", tmp_path / "strict", **options, **strict)
  out = evaluation.evaluate(request)
  assert out["damaged"] == []
  assert out["unreadable"] == [
    {"video": name, "reason": "too damaged", "questions": 3}
  ]


def test_what_is_left_out_is_listed_and_printed(request_of, tmp_path):
  """One task of MVBench, with a row that is unfit; another one is missing."""
  fixture = benchmark_files.write("mvbench", tmp_path / "data")
  for path in fixture.files[2:]:
    path.unlink()
  rows = json.loads(fixture.files[0].read_text())
  rows.append({**rows[0], "answer": "a colour that is none"})
  fixture.files[0].write_text(json.dumps(rows))
  out = evaluation.evaluate(
    request_of(
      "mvbench", tmp_path / "w", data=fixture.data_dir, on_bad_row="skip"
    )
  )
  assert out["vanilla"]["n"] == 2
  assert out["macro"] == ["action_sequence", "object_interaction"]
  assert out["left_out"]["bad_rows"] == [
    {
      "file": "object_interaction.json",
      "row": 2,
      "field": "answer",
      "reason": "'a colour that is none' is none of the options",
    }
  ]
  assert len(out["left_out"]["not_there"]) == 18
  console = terminal.Console(width=300, record=True)
  with console.capture() as captured:
    evaluation.show(out, console)
  printed = captured.get()
  assert "left out: 1 bad rows, first object_interaction.json row 2" in printed
  assert "not there: action_prediction, action_antonym" in printed


def test_guesses_and_other_rows_are_printed():
  out = {
    "left_out": {"other_rows": {"generation tasks": 418}},
    "unreadable": [{"video": "a.mp4", "reason": "missing", "questions": 2}],
    "vanilla": {"n": 7, "num_fallbacks": 3},
  }
  assert evaluation.caveats(out) == [
    "counted as wrong: 2 questions about a.mp4 (missing)",
    "left out: 418 rows, generation tasks",
    "guessed: 3 of 7 vanilla answers named no option",
  ]


def test_a_test_split_is_not_chosen_on(request_of, tmp_path):
  """LongVideoBench's validation is what tables show; others have none."""
  for name in NAMES:
    assert not benchmarks.task(name).can_choose("")
  assert benchmarks.task("prepared").can_choose("test")
  request = request_of(
    "longvideobench",
    tmp_path,
    methods=("last_query",),
    candidates={"last_query": ("last_query?layer=1",)},
  )
  with pytest.raises(errors.UserError, match="no validation split apart from"):
    evaluation.evaluate(request)


def test_flags_name_a_benchmark_and_its_folder(tmp_path):
  experiment = evaluate.experiment_of(
    evaluate.COMMAND.parse(
      [
        "evaluate",
        "--config=configs/synthetic.py:size=quickstart,debug",
        "--benchmark=mlvu_test",
        f"--data={tmp_path}",
        f"--workdir={tmp_path}",
        "--on_bad_row=skip",
        "--on_missing=count",
        "--max_new_tokens=0",
      ]
    )
  )
  evals, data = experiment.config.evals, experiment.config.data
  assert (evals.benchmark, data.root) == ("mlvu_test", str(tmp_path))
  assert (data.media, evals.split) == ("", "")
  assert (evals.on_bad_row, evals.on_missing) == ("skip", "count")
  assert evaluation.settings(experiment).max_new_tokens == 16
  for name, tokens in (("longvideobench", 32), ("nextqa", 1024)):
    longer = experiment.replace({"evals.benchmark": name})
    assert evaluation.settings(longer).max_new_tokens == tokens
