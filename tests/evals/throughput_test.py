"""Batches in flight: the answers of one question after the other, and rates."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

from cacovid_jax import errors
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation, throughput
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import device_watch
from cacovid_jax.inference import methods as methods_lib
from tests.evals import tiny

# A policy, draws, and a choice inside the language model.
METHODS = ("cacovid", "random", "fastv?layer=1")


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
  """Returns a folder of nine questions; the clip of the middle is broken."""
  folder = tmp_path_factory.mktemp("nine")
  tiny.write_data(folder, num_clips=3, per_clip=3)
  (folder / "videos" / "test1.mp4").write_bytes(b"not a video")
  return str(folder)


@pytest.fixture(scope="module")
def ask(nine, policy_file, checkpoint_dir, tmp_path_factory):
  """Returns f(batch size, ...) -> (lines of answers, results, timings)."""

  def ask(batch_size, workdir=None):
    workdir = workdir or tmp_path_factory.mktemp("asked")
    experiment = tiny.experiment(
      workdir,
      data=nine,
      checkpoint=checkpoint_dir,
      policies={"policy": policy_file},
      methods=METHODS,
      ratios=(0.5,),
      batch_size=batch_size,
      max_new_tokens=2,
    )
    evaluation.evaluate(experiment)
    lines = (workdir / "answers.jsonl").read_text().splitlines()[1:]
    out = json.loads((workdir / "results.json").read_text())
    provenance = out.pop("provenance")
    assert provenance["settings"]["batch_size"] == batch_size
    out["frame_hash"] = provenance["frame_hash"]
    times = json.loads((workdir / "timings.json").read_text())
    return lines, json.dumps(out), times

  with tiny.shared_programs():
    yield ask


@pytest.fixture(scope="module")
def plain(ask):
  """Returns what batches of one give, each program waited for."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(device_watch, "DeviceWatch", lambda: None)
    return ask(1)


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_batches_of_several_clips_change_no_byte(batch_size, ask, plain):
  lines, results, times = ask(batch_size)
  assert lines == plain[0] and results == plain[1]
  # Of nine, three about the broken clip; 4 + 4 + 1 or 8 + 1 at a time.
  records = list(map(json.loads, lines))
  assert len(records) == 9 * (1 + len(METHODS))
  assert sum("fault" in record for record in records) == 3 * 4
  found = times["throughput"]
  assert (found["clips"], found["questions"]) == (3, 9)
  assert 0 < found["busy_share"] <= 1
  rates = found["questions_per_second"], 3 * found["clips_per_second"]
  assert rates[0] == pytest.approx(rates[1]) and rates[0] > 0
  for name in ("clips", "tower", "policy", "vanilla", "answer from 32 tokens"):
    assert times["seconds"][name] > 0
  assert plain[2]["throughput"]["busy_share"] is None


def test_what_is_known_is_not_counted(ask, tmp_path, capfd):
  first = ask(4, tmp_path)
  assert "clips/s, " in capfd.readouterr().err
  again = ask(4, tmp_path)
  assert again[:2] == first[:2]
  found = again[2]["throughput"]
  assert (found["clips"], found["clips_per_second"]) == (0, None)
  assert "clips/s" not in capfd.readouterr().err


@pytest.fixture
def evaluator(checkpoint, data_dir):
  """Returns the evaluator of six questions in batches of two, in flight."""
  questions = evaluation.benchmarks.load(data_dir, "test").questions
  store = {"watch": device_watch.DeviceWatch()}
  given = checkpoint, data_dir, questions, (2, 2)
  with tiny.shared_programs():
    engine = tiny.engine_of(*given, store=store)
  with engine.source:
    yield evaluator_lib.Evaluator(engine)


CELLS = methods_lib.conditions([], (), ())


def run(evaluator, log, cells=CELLS):
  return evaluator.run(evaluator.engine.questions, cells, log)


def test_a_batch_is_asked_before_the_one_in_front_is_read(
  evaluator, monkeypatch
):
  events = []

  def ask(questions, todo, failures, number, tell):
    events.append(f"ask {number}")

    def finish(tell):
      events.append(f"read {number}")
      return [(CELLS[0].key(q.id), {"score": 0.0}) for q in questions]

    return finish

  monkeypatch.setattr(evaluator, "_ask", ask)
  run(evaluator, answer_log.AnswerLog(None, {}))
  assert events == ["ask 0", "ask 1", "read 0", "ask 2", "read 1", "read 2"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, errors.UserError])
def test_what_was_asked_before_a_stop_is_kept(
  kind, evaluator, monkeypatch, tmp_path
):
  whole = tmp_path / "whole.jsonl"
  with answer_log.AnswerLog(whole, {}) as log:
    run(evaluator, log)
  real = evaluator._ask

  def ask(questions, todo, failures, number, tell):
    if number == 1:
      raise kind("stop")
    return real(questions, todo, failures, number, tell)

  path = tmp_path / "cut.jsonl"
  with monkeypatch.context() as patch, pytest.raises(kind):
    patch.setattr(evaluator, "_ask", ask)
    with answer_log.AnswerLog(path, {}) as log:
      run(evaluator, log)
  lines = whole.read_bytes().splitlines(keepends=True)
  assert path.read_bytes() == b"".join(lines[:3])
  with answer_log.AnswerLog(path, {}) as log:
    run(evaluator, log)
  assert path.read_bytes() == whole.read_bytes()


def test_scores_that_are_not_finite_are_told_when_they_are_read(
  evaluator, checkpoint
):
  """The failure is the first batch's, though the second one was asked."""
  policy = tiny.policy_of(checkpoint)
  params = jax.tree.map(lambda x: x * jnp.nan, policy.params)
  broken = dataclasses.replace(policy, params=params)
  evaluator.engine.policies = {"policy": broken}
  methods = [methods_lib.Method.parse(name) for name in ("cacovid", "uniform")]
  cells = methods_lib.conditions(methods, (0.5,), (0,))
  log = answer_log.AnswerLog(None, {})
  failures = run(evaluator, log, cells)
  ((place, failure),) = failures.items()
  assert place == ("cacovid", 0.5) and failure.batch == 0
  assert "hold NaN" in failure.reason
  assert {key.method for key in log} == {"vanilla", "uniform"}
  assert len(log) == 2 * len(evaluator.engine.questions)


def test_features_that_are_not_finite_are_named_when_they_are_read(evaluator):
  video = evaluator.engine.questions[2].video
  source = evaluator.engine.source
  clip = source[video]
  assert isinstance(clip.features, jax.Array)
  nan = {"features": clip.features.at[3, 0].set(jnp.nan)}
  source._clips[video] = dataclasses.replace(clip, arrays=nan)
  with pytest.raises(errors.UserError, match=f"{video} hold NaN"):
    run(evaluator, log := answer_log.AnswerLog(None, {}))
  assert len(log) == 2  # Of the batch in front.


def test_a_full_device_names_the_program_and_the_batch_size(
  evaluator, monkeypatch
):
  def full(*args, **options):
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.00GiB."
    )

  monkeypatch.setattr(evaluator.engine.programs, "vanilla", full)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    run(evaluator, answer_log.AnswerLog(None, {}))
  assert errors._of_device(caught.value) == (
    "the device is out of memory while computing 'vanilla' of 2 at once"
    " (3.00 GiB asked for); lower the batch size of 2 (evals. or"
    " validation.batch_size)"
  )


def test_clips_leave_the_device_when_all_is_asked(evaluator):
  run(evaluator, answer_log.AnswerLog(None, {}))
  held = evaluator.engine.source._clips.values()
  assert held
  for clip in held:
    assert not any(isinstance(x, jax.Array) for x in clip.arrays.values())


def test_rates_by_hand():
  now = [100.0]
  watch = device_watch.DeviceWatch(clock=lambda: now[0])
  counted = throughput.Throughput(watch, lambda: now[0])
  clips = [types.SimpleNamespace(video=name) for name in "aabc"]
  with counted.running():
    now[0] = 104.0
    watch.note("answer", 100.0, 101.0, 103.0)
    assert counted.add(clips[:3]) == 0.5
    now[0] = 110.0
    watch.note("answer", 103.0, 104.0, 109.0)
    assert counted.add(clips[2:]) == pytest.approx(2 / 6)
  now[0] = 200.0  # Not asked for.
  with counted.running():
    now[0] = 210.0
  watch.close()
  found = counted.report()
  assert found == {
    "seconds": 20.0,
    "clips": 3,
    "questions": 5,
    "clips_per_second": 0.15,
    "questions_per_second": 0.25,
    "busy_share": 7 / 20,
  }
  line = "3 clips, 5 questions: 0.15 clips/s, 0.25 questions/s, device busy 35%"
  assert throughput.told(found) == line
  assert not throughput.told(throughput.Throughput().report())
