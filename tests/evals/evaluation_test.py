"""A whole evaluation from directories on disk to its files."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from cacovid_jax import base_config, errors, evaluate, files, terminal
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.evals import evaluation
from tests.evals import report_test, tiny

FILES = {
  "answers.jsonl",
  "frames.jsonl",
  "report.html",
  "results.json",
  "timings.json",
  "validation_answers.jsonl",
}


pytestmark = pytest.mark.usefixtures("one_compilation")


@pytest.fixture(scope="module")
def request_of(checkpoint_dir, data_dir, policy_file):
  def make(workdir, **changes):
    fields = dict(
      data=data_dir,
      checkpoint=checkpoint_dir,
      policies={"policy": policy_file},
      methods=("cacovid", "last_query"),
      ratios=(0.1,),
      batch_size=4,
      max_new_tokens=3,
      num_examples=2,
      select_on="validation",
    )
    return tiny.experiment(workdir, **fields | changes)

  return make


@pytest.fixture(scope="module")
def finished(request_of, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("work")
  return workdir, evaluation.evaluate(request_of(workdir))


@pytest.mark.parametrize("drawn", [None, 4, 8])
def test_decisive_tokens_of_other_frames_are_left_out(
  drawn, request_of, data_dir, tmp_path, monkeypatch
):
  """Data of which nobody knows for how many frames they were drawn are read."""
  data = shutil.copytree(data_dir, tmp_path / "data")
  path, told = data / "manifest.json", []
  manifest = json.loads(path.read_text())
  path.write_text(
    json.dumps(manifest | ({"num_frames": drawn} if drawn else {}))
  )
  monkeypatch.setattr(
    evaluation.logging,
    "log_first_n",
    lambda _, text, count, *values: told.append((count, text % values)),
  )
  found = evaluation.load_benchmark(request_of(tmp_path, data=str(data)))
  if drawn == 8:
    assert found.questions and not found.decisive
    text = "decisive.jsonl is of 8 frames, not 4, and left out"
    assert told == [(1, f"{data}: {text}")]
  else:
    assert len(found.decisive) == len(found.questions) and not told


def test_writes_its_files(finished, policy_file):
  workdir, out = finished
  assert {path.name for path in workdir.iterdir()} == FILES
  assert json.loads((workdir / "results.json").read_text()) == out
  assert out["benchmark"] == "blocks"
  assert list(out["methods"]) == ["cacovid", "last_query"]
  assert out["methods"]["cacovid"]["0.10"]["kept_tokens"] == 6
  assert out["provenance"]["generator_hash"] == "0123abcd"
  assert out["frame_head"]["n"] == 6
  assert len(out["provenance"]["policies"]["policy"]) == 64
  timings = json.loads((workdir / "timings.json").read_text())
  assert timings["seconds"]["vanilla"] > 0
  # Two clips of four frames each, seen with both methods.
  page = (workdir / "report.html").read_text()
  outline = report_test.Outline(page)
  assert len(outline.classed("clip")) == 2
  assert page.count("data:image/jpeg") == 8
  for clip in outline.data()["viewer"]["clips"]:
    assert set(clip["views"]) == {"cacovid", "last_query"}
    assert set(clip["scores"]) == {"cacovid"}
    for row in clip["views"].values():
      assert len(report_test.unpack(row["0.1"], tiny.NUM_VIDEO)) == 6
  assert "No times were measured" in outline.joined()


def test_the_layer_is_chosen_on_validation(finished):
  workdir, out = finished
  record = out["chosen"]["last_query"]
  assert (record["split"], record["n"]) == ("validation", 6)
  accuracies = {c["method"]: c["accuracy"] for c in record["candidates"]}
  assert list(accuracies) == [f"last_query?layer={i}" for i in range(3)]
  assert accuracies[record["best"]] == max(accuracies.values())
  layer = int(record["best"].rpartition("=")[2])
  assert out["methods"]["last_query"]["0.10"]["options"] == {"layer": layer}
  # The test's answers are those of the chosen layer alone.
  lines = (workdir / "answers.jsonl").read_text().splitlines()[1:]
  methods = {json.loads(line)["method"] for line in lines}
  assert methods == {"vanilla", "cacovid", record["best"]}
  lines = (workdir / "validation_answers.jsonl").read_text().splitlines()[1:]
  assert all("validation" in json.loads(line)["question"] for line in lines)


def test_candidates_that_cannot_be_run_are_not_chosen(request_of, tmp_path):
  """Layer 7 of three does not exist; a row of nothing else stays as it is."""
  missing, present = "last_query?layer=7", "last_query?layer=1"
  out = evaluation.evaluate(
    request_of(
      tmp_path,
      policies={},
      methods=("a=last_query", "b=last_query", "c=last_query?layer=7"),
      candidates={"a": (missing, present), "b": (missing,)},
      num_examples=1,
    )
  )
  assert list(out["chosen"]) == ["a"]
  assert out["chosen"]["a"]["best"] == present
  assert [c["method"] for c in out["chosen"]["a"]["candidates"]] == [present]
  assert out["methods"]["a"]["0.10"]["options"] == {"layer": 1}
  assert out["methods"]["b"]["0.10"]["status"] == "ok"
  assert "layer 7 does not exist" in out["methods"]["c"]["0.10"]["status"]
  page = (tmp_path / "report.html").read_text()
  assert "layer 7 does not exist" in page and page.count("<article") == 1
  console = terminal.Console(width=200, record=True)
  with console.capture() as captured:
    evaluation.show(out, console)
  assert "layer 7" in captured.get()


def test_the_same_command_again_gives_the_same_bytes(finished, request_of):
  workdir, _ = finished
  names = ("results.json", "report.html", "answers.jsonl")
  before = {name: (workdir / name).read_bytes() for name in names}
  evaluation.evaluate(request_of(workdir))
  assert {name: (workdir / name).read_bytes() for name in names} == before


def test_a_second_evaluation_is_refused_before_it_writes(finished, request_of):
  workdir, _ = finished
  before = {path: path.read_bytes() for path in workdir.iterdir()}
  with files.claim(workdir / "evaluate"):
    with pytest.raises(errors.UserError) as error:
      evaluation.evaluate(request_of(workdir, ratios=(0.2,)))
  assert str(error.value) == (
    f"another evaluation is writing to {workdir} (process {os.getpid()} on"
    f" {socket.gethostname()}); wait for it, use another workdir, or share the"
    " work with --shard=0/2 and --shard=1/2"
  )
  with files.claim(workdir / "evaluate-1-of-2"):
    with pytest.raises(errors.UserError, match="another evaluation"):
      evaluation.evaluate(request_of(workdir, shard=(1, 2)))
    # Another share is another role.
    evaluation.evaluate(request_of(workdir))
  after = {path: path.read_bytes() for path in workdir.iterdir()}
  for changed in (before, after):
    del changed[workdir / "timings.json"]
  assert after == before


def test_frames_of_another_run_are_shown_again(finished, request_of, tmp_path):
  """A file that lacks a clip is refused before anything is asked."""
  workdir, out = finished
  lines = (workdir / "frames.jsonl").read_text().splitlines(keepends=True)
  assert len(lines) == 1 + 3 + 3  # Clips of both splits.
  given = tmp_path / "given.jsonl"
  given.write_text("".join(lines[:-1]))
  with pytest.raises(errors.UserError, match="no frames of 1 of 6 clips"):
    evaluation.evaluate(request_of(tmp_path, frame_manifest=str(given)))
  assert not (tmp_path / "answers.jsonl").exists()
  provenance = out["provenance"]
  assert len(provenance["frame_index_hash"]) == 64
  assert provenance["frame_index_hash"] != provenance["frame_hash"]
  assert len(provenance["template_hash"]) == 64
  assert provenance["device"] == "cpu"


# As Qwen2's tokenizer has it: plain strings, and a system turn by default.
QWEN2_TEMPLATE = (
  "{% for message in messages %}"
  "{% if loop.first and message['role'] != 'system' %}"
  "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
  "{% endif %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
  "{{ '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def two_templates(checkpoint_dir, tmp_path_factory):
  """Returns a copy whose tokenizer has a template of its own."""
  folder = tmp_path_factory.mktemp("templates") / "model"
  shutil.copytree(checkpoint_dir, folder)
  set_tokenizer_template(folder, QWEN2_TEMPLATE)
  return folder


def set_tokenizer_template(folder, text):
  path = folder / "tokenizer_config.json"
  described = json.loads(path.read_text())
  path.write_text(json.dumps(described | {"chat_template": text}))


def test_the_papers_template_has_a_system_turn(two_templates, checkpoint):
  def rendered(template):
    found = experiment_lib.with_template(
      checkpoint, str(two_templates), template
    )
    return found.tokenizer.render("Why?")

  turn = "<|im_start|>user\n<video>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
  system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  assert rendered("tokenizer") == system + turn
  assert rendered("") == rendered("processor") == turn


def test_the_template_reaches_the_answers(
  finished, request_of, two_templates, tmp_path
):
  """Prompts of another template are other prompts, and are not mixed."""
  changes = dict(
    checkpoint=str(two_templates),
    template="tokenizer",
    methods=("uniform",),
    select_on="none",
    num_examples=0,
  )
  with pytest.raises(errors.UserError, match="differs in questions, template"):
    evaluation.evaluate(request_of(finished[0], **changes))
  out = evaluation.evaluate(request_of(tmp_path, **changes))
  expected = hashlib.sha256(QWEN2_TEMPLATE.encode()).hexdigest()
  assert out["provenance"]["template_hash"] == expected
  assert finished[1]["provenance"]["template_hash"] != expected


def test_a_tokenizer_without_a_template_is_named(
  two_templates, request_of, tmp_path
):
  folder = shutil.copytree(two_templates, tmp_path / "model")
  set_tokenizer_template(folder, None)
  with pytest.raises(errors.UserError) as caught:
    evaluation.evaluate(
      request_of(tmp_path, checkpoint=str(folder), template="tokenizer")
    )
  text = str(caught.value)
  assert text.startswith(
    f"{folder}: tokenizer_config.json has no chat_template"
  )
  assert "\n" not in text and "template=processor" in text


def test_a_line_tells_all_that_a_table_needs(finished):
  workdir, out = finished
  lines = (workdir / "answers.jsonl").read_text().splitlines()[1:]
  lines = [json.loads(line) for line in lines]
  rows = [line for line in lines if line["method"] == "cacovid"]
  assert len(rows) == out["vanilla"]["n"]
  scores = [float(line["letter"] == line["answer"]) for line in rows]
  cell = out["methods"]["cacovid"]["0.10"]
  assert sum(scores) / len(rows) == pytest.approx(cell["accuracy"], abs=1e-6)
  for name, group in cell["by_duration"].items():
    found = [
      score
      for score, line in zip(scores, rows, strict=True)
      if line["duration"] == name
    ]
    assert len(found) == group["n"]
    assert sum(found) / len(found) == pytest.approx(group["accuracy"], abs=1e-6)
  assert {line["kept"] for line in rows} == {6}
  assert {line["of"] for line in lines} == {64}


def test_more_rows_are_added_to_a_finished_evaluation(
  finished, request_of, tmp_path
):
  workdir, out = finished
  for name in FILES:
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  more = evaluation.evaluate(
    request_of(
      tmp_path,
      methods=("cacovid", "uniform"),
      oracles=("decisive_boxes",),
      num_examples=0,
    )
  )
  assert more["methods"]["cacovid"] == out["methods"]["cacovid"]
  assert list(more["oracles"]) == ["decisive_boxes"]
  assert not more["chosen"]


def test_another_policy_needs_another_workdir(
  finished, request_of, checkpoint, tmp_path
):
  other = tiny.write_policy(tmp_path / "policy", checkpoint, seed=5)
  with pytest.raises(errors.UserError, match="differs in policies"):
    evaluation.evaluate(
      request_of(finished[0], policies={"policy": other}, methods=("cacovid",))
    )


def test_the_table_names_every_row(finished):
  console = terminal.Console(width=100, record=True)
  with console.capture() as captured:
    evaluation.show(finished[1], console)
  text = captured.get()
  for expected in ("cacovid", "last_query", "10% kept", "vanilla (all 64"):
    assert expected in text


def test_validator_scores_a_policy(request_of, checkpoint, tmp_path):
  experiment = request_of(tmp_path)
  validate = evaluation.validator(experiment)
  policy = experiment.policies["policy"]
  found = validate(policy.module, policy.params)
  assert 0 <= found["accuracy"] <= 1
  assert validate(policy.module, policy.params) == found
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes,match",
  [
    ({"ratios": (0.1, 1.5)}, "1.5; it must be a number above 0"),
    ({"ratios": (0.1, 0.01)}, "keeps no token"),
    ({"methods": ("randon",)}, "did you mean random"),
    ({"methods": ("random", "random")}, "listed twice"),
    ({"methods": ()}, "no method given"),
    ({"policies": {}}, "needs a trained policy"),
    ({"policies": {"p": "nowhere"}}, "no policy in nowhere"),
    ({"select_on": "test"}, "must be one of validation, none"),
    ({"candidates": {"divprune": ("divprune",)}}, "not among the methods"),
    ({"checkpoint": "nowhere"}, "nowhere"),
    ({"data": "nowhere"}, "no data in nowhere"),
    ({"seeds": ()}, "no evaluation seed"),
    ({"metrics": "nowhere"}, "name a training workdir"),
    ({"metrics": __file__}, "_test.py/metrics.jsonl; name a training"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"template": "model"}, "must be one of processor, tokenizer"),
    ({"shard": (1, 1)}, "give 0/1"),
    ({"min_pixels": 784}, "frames of one size"),
    ({"frame_manifest": "nowhere"}, "no frame manifest nowhere"),
    # The decisive tokens lie in later frames.
    ({"num_frames": 1}, "outside the model's grid"),
  ],
)
def test_mistakes_are_one_line(changes, match, request_of, tmp_path):
  changes = {"methods": ("cacovid",)} | changes
  with pytest.raises(errors.UserError, match=match) as caught:
    evaluation.evaluate(request_of(tmp_path, **changes))
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "results.json").exists()


def test_flags_and_defaults(tmp_path):
  def experiment_of(*words):
    words = ("--checkpoint=m", "--data=d", f"--workdir={tmp_path}", *words)
    return evaluate.experiment_of(evaluate.COMMAND.parse(["evaluate", *words]))

  defaults = base_config.get_config().evals
  found = experiment_of("--policy=a,b")
  assert found.config.evals.methods == defaults.methods
  assert found.policy_paths == {"policy": "a", "policy1": "b"}
  # Without a policy, the default rows are those that can be run.
  methods = experiment_of().config.evals.methods
  assert methods == tuple(m for m in defaults.methods if "cacovid" not in m)
  assert experiment_of("--methods=cacovid").config.evals.methods == ("cacovid",)
  found = experiment_of("--policy=ours=a,paper=b").policy_paths
  assert found == {"ours": "a", "paper": "b"}
  found = experiment_of("--policy=a?module=f.py:F,x=b?module=g.py:G")
  assert found.policy_paths == {
    "policy": "a?module=f.py:F",
    "x": "b?module=g.py:G",
  }
  with pytest.raises(errors.UserError, match="--ratios"):
    experiment_of("--ratios=0.1,x")


def test_a_workdirs_policy_takes_the_module_that_the_config_names(tmp_path):
  (tmp_path / "policy.safetensors").touch()
  path = tmp_path / "run.py"
  path.write_text(
    "from cacovid_jax import base_config\n"
    "get_config = lambda arg: base_config.get_config()\n"
  )
  given = (f"--config={path}", f"--workdir={tmp_path}", "--data=d")
  for more, expected in (
    ([], ""),
    (["--config.policy.module=m.py:A"], "?module=m.py:A"),
  ):
    words = ["evaluate", *given, "--checkpoint=c", *more]
    found = evaluate.experiment_of(evaluate.COMMAND.parse(words))
    assert found.policy_paths == {"policy": f"{tmp_path}{expected}"}


def test_command_line_mistakes_end_without_traceback():
  run = subprocess.run(
    [sys.executable, "-m", "cacovid_jax.evaluate", "--checkpoint=x"],
    capture_output=True,
    text=True,
  )
  assert run.returncode == 2
  assert "nothing says which data" in run.stderr
  assert "Traceback" not in run.stderr
