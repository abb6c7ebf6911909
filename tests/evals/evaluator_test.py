"""The evaluator on a tiny random model and real mp4 files."""

import copy
import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, registry
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, provenance, results
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import prompts as prompts_lib
from cacovid_jax.models import generation
from tests.evals import tiny

RATIOS = (0.25, 0.1)
SIZES = (4, 3)  # Of a batch and of an answer.


@pytest.fixture(scope="module")
def shared(checkpoint, data_dir):
  """Returns the test split and its evaluator; programs compile once."""
  benchmark = benchmarks.load(data_dir, "test")
  engine = tiny.engine_of(
    checkpoint, data_dir, benchmark.questions, SIZES,
    policies={"policy": tiny.policy_of(checkpoint)},
    decisive=benchmark.decisive,
  )  # fmt: skip
  return benchmark, evaluator_lib.Evaluator(engine)


def methods_of(*names):
  return [methods_lib.Method.parse(name) for name in names]


# Those that look at different things; all rules are in compressors_test.py.
EVERY = (
  "cacovid",
  "cacovid_untrained",
  "cacovid_other_question",
  "random",
  "uniform",
  "last_query",
  "decisive_boxes",
)


def tabulate(
  benchmark, evaluator, answers, methods, seeds=(0, 1), ratios=RATIOS, **options
):
  table = results.Table(
    benchmark.name,
    benchmark.split,
    benchmark.questions,
    methods,
    ratios,
    seeds,
    evaluator.engine.grid,
  )
  described = provenance.describe(
    frame_hashes=results.frame_hashes(table, answers),
    checkpoint={"sha256": "0"},
    policies={"policy": "1"},
    generator_hash=benchmark.generator_hash,
  )
  return results.build(
    table, answers, provenance=described, decisive=benchmark.decisive, **options
  )


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
  """Returns the ledger of an evaluation with every method."""
  path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
  ask(shared, methods_of(*EVERY), path, seeds=(0, 1))
  return path


def reopened(path, shared):
  benchmark, evaluator = shared
  return answer_log.AnswerLog(path, evaluator.identity(benchmark.questions))


def ask(shared, methods, path=None, ratios=RATIOS, seeds=(0,)):
  """Returns (failures, answers) of an evaluation."""
  benchmark, evaluator = shared
  cells = methods_lib.conditions(methods, ratios, seeds)
  with reopened(path, shared) as answers:
    return evaluator.run(benchmark.questions, cells, answers), answers


def test_every_question_is_answered_by_every_method(shared, whole):
  benchmark, evaluator = shared
  answers = reopened(whole, shared)
  # Vanilla, four methods without and three with seeds, at two ratios.
  assert len(answers) == len(benchmark.questions) * (1 + 2 * (4 + 2 * 3))
  for cell in methods_lib.conditions(methods_of(*EVERY), RATIOS, (0, 1)):
    for question in benchmark.questions:
      record = answers[cell.key(question.id)]
      expected = 64 if cell.method is None else {0.25: 16, 0.1: 6}[cell.ratio]
      assert record["kept"] == expected


def test_one_answering_program_per_ratio(shared, whole):
  del whole  # It has run.
  programs = shared[1].engine.programs
  assert programs.compiled["answer"] == len(RATIOS)
  assert programs.compiled["vanilla"] == 1
  assert programs.compiled["embed"] == 1
  assert programs.compiled["scores"] == 1  # Shared by all three policies.


def test_a_stopped_evaluation_goes_on_to_the_same_bytes(
  whole, tmp_path, shared
):
  lines = whole.read_bytes().splitlines(keepends=True)
  benchmark, evaluator = shared
  path = tmp_path / "answers.jsonl"
  # Killed within the second batch, in the middle of a line.
  path.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
  methods = methods_of(*EVERY)
  _, answers = ask(shared, methods, path, seeds=(0, 1))
  assert path.read_bytes() == whole.read_bytes()
  again = tabulate(benchmark, evaluator, answers, methods)
  first = tabulate(benchmark, evaluator, reopened(whole, shared), methods)
  assert json.dumps(again) == json.dumps(first)


def test_a_complete_evaluation_computes_nothing(shared, whole):
  _, evaluator = shared
  before = dict(evaluator.engine.seconds)
  ask(shared, methods_of("random"), whole)
  assert dict(evaluator.engine.seconds) == before


def test_answers_of_another_run_are_refused(shared, whole):
  benchmark, evaluator = shared
  identity = evaluator.identity(benchmark.questions) | {"checkpoint": "another"}
  with pytest.raises(errors.UserError, match="differs in checkpoint"):
    answer_log.AnswerLog(whole, identity)


@pytest.mark.parametrize(
  "change",
  [
    {"answer": "E"},
    {"options": ("one", "another")},
    {"video": "videos/test2.mp4"},
    {"problem_type": question_lib.FREE_FORM},
    {"prompt": "Which colour?"},
  ],
)
def test_answers_to_a_changed_question_are_refused(shared, whole, change):
  """Scores are kept, so that a corrected answer key makes them stale."""
  benchmark, evaluator = shared
  first, *rest = benchmark.questions
  changed = dataclasses.replace(first, **change)
  assert changed != first
  if "prompt" in change:
    engine = engine_lib.Engine(
      evaluator.engine.checkpoint,
      evaluator.engine.source,
      [changed, *rest],
      evaluator.engine.settings,
    )
    evaluator = evaluator_lib.Evaluator(engine)
  identity = evaluator.identity([changed, *rest])
  # Their order is none of it.
  known = shared[1].identity(benchmark.questions[::-1])
  assert known == shared[1].identity(benchmark.questions)
  assert identity["questions"] != known["questions"]
  with pytest.raises(errors.UserError, match="differs in .*questions"):
    answer_log.AnswerLog(whole, identity)


def test_only_clips_that_are_asked_about_are_decoded_ahead(shared, monkeypatch):
  benchmark, evaluator = shared
  source, prepared, ahead = evaluator.engine.source, [], []
  batches = [list(benchmark.questions[i : i + 2]) for i in (0, 2, 4)]
  videos = [batch[0].video for batch in batches]
  assert len(set(videos)) == 3
  cells = methods_lib.conditions([], (), ())
  answers = answer_log.AnswerLog(None, {})
  answers.add([(cells[0].key(q.id), {"score": 0.0}) for q in batches[1]])

  def ask(questions, todo, failures, number, tell):
    # Takes no clip, as where all that was decoded ahead is not needed.
    ahead.append(set(source._ahead))
    for future in source._ahead.values():
      future.result()
    found = [(cells[0].key(q.id), {"score": 0.0}) for q in questions]
    return lambda tell: found

  source.clear()
  monkeypatch.setattr(source, "_load_or_fault", prepared.append)
  monkeypatch.setattr(evaluator.engine, "batches", lambda questions: batches)
  monkeypatch.setattr(evaluator, "_ask", ask)
  evaluator.run(benchmark.questions, cells, answers)
  assert len(answers) == 6
  assert ahead == [{videos[0], videos[2]}, {videos[2]}]
  assert prepared == [videos[0], videos[2]]
  assert not source._ahead


def test_what_a_damaged_line_held_is_asked_again(shared, whole, tmp_path):
  lines = whole.read_bytes().splitlines(keepends=True)
  path = tmp_path / "answers.jsonl"
  half = b'{"half": \n'
  changed = lines[5].replace(b'"score": ', b'"score": 1')
  path.write_bytes(b"".join([*lines[:2], half, *lines[2:5], changed]))
  with reopened(path, shared) as answers:
    assert len(answers) == 4
  aside = tmp_path / "answers.jsonl.damaged"
  assert aside.read_bytes() == half + changed
  path.write_bytes(b"".join([*lines[:5], half, *lines[6:]]))
  ask(shared, methods_of(*EVERY), path, seeds=(0, 1))
  after = path.read_bytes().splitlines(keepends=True)
  assert after == [*lines[:5], *lines[6:], lines[5]]


def test_answers_equal_those_of_one_question_alone(shared, whole, checkpoint):
  benchmark, evaluator = shared
  model, params = checkpoint.model, checkpoint.params
  answers = reopened(whole, shared)
  policy = evaluator.engine.policies["policy"]
  question = benchmark.questions[3]
  prompt = checkpoint.tokenizer.encode_prompt(question.prompt, 64)
  features = jnp.asarray(evaluator.engine.source[question.video].features)
  positions = jnp.arange(prompt.length)[None]
  video = jnp.asarray(prompt.video_rows)

  @jax.jit
  def read(params, own):
    x = model.embed_prompt(params, prompt.ids, features, prompt.video_rows)
    _, out = model.forward(
      params, x[None], positions[None], want_attention=True
    )
    scores = policy.module.apply(
      {"params": own}, x, positions, video, tiny.GRID
    )
    return x, scores, out["last_query_attention"][:, 0, video]

  x, scores, attention = read(params, policy.params)
  inputs = base.CompressorInputs(
    features=features, grid=tiny.GRID, scores=scores, attention=attention
  )
  greedy = jax.jit(
    lambda x, rows: generation.greedy(
      model,
      params,
      x[rows][None],
      rows[None, None],
      jnp.array([len(rows)]),
      jnp.array([prompt.length]),
      max_new_tokens=3,
      eos_ids=checkpoint.eos_ids,
      pad_id=checkpoint.pad_id,
    )
  )
  for name in ("uniform", "cacovid", "last_query"):
    select = compressors.get(name).select
    choose = jax.jit(functools.partial(select, num_keep=6, ratio=0.1))
    index = choose(inputs).index
    dropped = set(range(64)) - set(np.asarray(index).tolist())
    rows = [
      i for i in range(prompt.length) if i - prompt.video_rows[0] not in dropped
    ]
    text = checkpoint.tokenizer.decode(greedy(x, jnp.asarray(rows))[0]).strip()
    assert answers[answer_log.Key(name, 0.1, 0, question.id)]["text"] == text


def test_keeping_everything_answers_like_vanilla(shared):
  _, answers = ask(shared, methods_of("uniform"), ratios=(1.0,))
  cells = methods_lib.conditions(methods_of("uniform"), (1.0,), (0,))
  for question in shared[0].questions:
    texts = [answers[cell.key(question.id)]["text"] for cell in cells]
    assert texts[0] == texts[1]


def test_merged_rows_reach_the_model(shared, checkpoint):
  """A method that changes the rows it keeps is answered from those rows."""
  benchmark, evaluator = shared

  def zeros(features, *, grid, num_keep, text=None, aux=None, rng=None):
    selection = base.take(features, jnp.arange(num_keep))
    # Part of the budget: the rest is padding, as the interface has it.
    valid = jnp.arange(num_keep) < 6
    return selection._replace(
      features=jnp.zeros_like(selection.features),
      index=jnp.where(valid, selection.index, features.shape[0]),
      mask=valid,
    )

  def first(features, *, grid, num_keep, text=None, aux=None, rng=None):
    return base.take(features, jnp.arange(num_keep))

  engine = evaluator.engine
  batch = engine.batch(benchmark.questions[:4]).batch
  ids = {}
  for function in (zeros, first):
    compressor = registry.FunctionCompressor(name="own", function=function)
    program = engine.programs.select(compressor, 0.25, tiny.GRID)
    selection = program(
      base.CompressorInputs(features=batch.features, grid=tiny.GRID)
    )
    ids[function] = engine.programs.answer(checkpoint.params, batch, selection)
  fewer = engine.programs.select(
    registry.FunctionCompressor(name="own", function=first), 0.1, tiny.GRID
  )(base.CompressorInputs(features=batch.features * 0, grid=tiny.GRID))
  assert fewer.index.shape[1] == 6
  expected = engine.programs.answer(checkpoint.params, batch, fewer)
  np.testing.assert_array_equal(ids[zeros], expected)
  assert not np.array_equal(ids[zeros], ids[first])


def test_bad_clips_count_as_wrong_and_are_listed(
  shared, checkpoint, data_dir, tmp_path, monkeypatch
):
  benchmark, evaluator = shared
  root = tmp_path / "blocks"
  shutil.copytree(data_dir, root)
  found = sorted((root / "videos").glob("test*.mp4"))
  found[0].unlink()
  found[1].write_bytes(b"not a video")
  source = tiny.open_store(
    str(root),
    checkpoint.model,
    checkpoint.params,
    checkpoint.model.processor,
    num_frames=4,
  )
  monkeypatch.setattr(evaluator.engine, "source", source)
  methods = methods_of("random", "cacovid")
  _, answers = ask(shared, methods)
  table = tabulate(benchmark, evaluator, answers, methods, seeds=(0,))
  assert table["vanilla"]["n"] == len(benchmark.questions)
  assert [entry["reason"] for entry in table["unreadable"]] == [
    "missing",
    "unreadable",
  ]
  assert all(entry["questions"] == 2 for entry in table["unreadable"])
  bad = [q for q in benchmark.questions if q.video.endswith(found[0].name)]
  for question in bad:
    record = answers[answer_log.Key("random", 0.1, 0, question.id)]
    assert record["score"] == 0 and record["text"] == ""
  assert str(tmp_path) not in json.dumps(table)


def test_other_question_is_about_another_clip(shared):
  benchmark, evaluator = shared
  by_id = {question.id: question for question in benchmark.questions}
  drawn = {}
  for question in benchmark.questions:
    for seed in range(4):
      other = by_id[
        methods_lib.other_question(question, benchmark.questions, seed)
      ]
      assert other.video != question.video
      assert other.prompt != question.prompt
      drawn[question.id, seed] = other.id
  assert len(set(drawn.values())) > 2
  alone = [q for q in benchmark.questions if "test0" in q.id]
  with pytest.raises(errors.UserError, match="two clips"):
    methods_lib.other_question(alone[0], alone, 0)


def test_seeds_are_reproducible_and_differ(shared, whole):
  answers = reopened(whole, shared)
  texts = {
    seed: [
      answers[answer_log.Key("random", 0.1, seed, question.id)]["text"]
      for question in shared[0].questions
    ]
    for seed in (0, 1)
  }
  assert texts[0] != texts[1]


def test_trace_agrees_with_the_table(shared, whole):
  benchmark, evaluator = shared
  answers = reopened(whole, shared)
  method = methods_of("cacovid")[0]
  for question in benchmark.questions[:2]:
    found = evaluator.engine.answer(
      question, methods_lib.Condition(method, 0.1)
    )
    record = answers[answer_log.Key("cacovid", 0.1, 0, question.id)]
    assert found.text == record["text"]
    assert found.trace.index.shape == (6,)
    assert found.trace.token_gap.shape == (64,)
    order = np.argsort(-found.trace.frame_gap, kind="stable")
    assert order.tolist() == record["frames"]


def test_a_users_own_method_from_a_file(shared, tmp_path):
  benchmark, evaluator = shared
  path = tmp_path / "mine.py"
  path.write_text(
    "import jax.numpy as jnp\n"
    "from cacovid_jax.compressors import base\n"
    "def first(features, *, grid, num_keep, text=None, aux=None, rng=None):\n"
    "  return base.take(features, jnp.arange(num_keep))\n"
  )
  method = methods_lib.Method.parse(f"{path}:first")
  assert method.label == "first"
  found = evaluator.engine.answer(
    benchmark.questions[0], methods_lib.Condition(method, 0.1)
  )
  np.testing.assert_array_equal(found.trace.index, np.arange(6))
  # Answers of a file that has changed since are not taken for its own.
  path.write_text(path.read_text() + "# Changed.\n")
  assert methods_lib.Method.parse(f"{path}:first").spec != method.spec


def test_a_trained_method_follows_its_parameters(shared, tmp_path):
  benchmark, evaluator = shared
  question = benchmark.questions[0]
  (tmp_path / "mine.py").write_text(
    "import dataclasses\n"
    "from cacovid_jax.compressors import base\n"
    "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
    "class Mine(base.Compressor):\n"
    "  trained = True\n"
    "  def choose(self, inputs, num_keep, ratio, params):\n"
    "    scores = inputs.features @ params['head']\n"
    "    return base.take_top(inputs.features, scores, num_keep)\n"
  )
  features = evaluator.engine.source[question.video].features
  head = np.eye(features.shape[1], dtype=np.float32)[3]
  for name, sign in (("a", 1), ("b", -1)):
    path = tmp_path / f"{name}.safetensors"
    safetensors.numpy.save_file({"head": sign * head}, path)
    spec = f"{tmp_path}/mine.py:Mine?weights={path}"
    found = evaluator.engine.answer(
      question, methods_lib.Condition(methods_lib.Method.parse(spec), 0.1)
    )
    order = np.argsort(-sign * features[:, 3], kind="stable")
    np.testing.assert_array_equal(found.trace.index, np.sort(order[:6]))


def test_policies_by_name(shared, checkpoint, monkeypatch):
  benchmark, evaluator = shared
  question = benchmark.questions[0]
  ours, paper = tiny.policy_of(checkpoint, 1), tiny.policy_of(checkpoint, 2)

  def kept(spec, policies):
    monkeypatch.setattr(evaluator.engine, "policies", policies)
    condition = methods_lib.Condition(methods_lib.Method.parse(spec), 0.25)
    return evaluator.engine.answer(question, condition).trace.index

  both = {"ours": ours, "paper": paper}
  second = kept("cacovid?policy=paper", both)
  np.testing.assert_array_equal(second, kept("cacovid", {"only": paper}))
  assert not np.array_equal(second, kept("cacovid", both))
  with pytest.raises(errors.UserError, match="no policy 'theirs'"):
    kept("cacovid?policy=theirs", both)


def test_a_policy_that_gives_nan_is_refused(shared, checkpoint, monkeypatch):
  policy = tiny.policy_of(checkpoint)
  params = jax.tree.map(lambda p: p * jnp.nan, policy.params)
  broken = dataclasses.replace(policy, params=params)
  monkeypatch.setattr(shared[1].engine, "policies", {"policy": broken})
  with pytest.raises(errors.UserError, match="NaN"):
    ask(shared, methods_of("cacovid"), ratios=(0.25,))


def own(name, function, **fields):
  compressor = registry.FunctionCompressor(
    name=name, function=function, **fields
  )
  return methods_lib.Method(name, name, compressor)


def grumbling(features, *, grid, num_keep, text=None, aux=None, rng=None):
  if num_keep < 10:
    raise errors.UserError("grumbling: needs at least\n10 tokens")
  return base.take(features, jnp.arange(num_keep))


def test_a_cell_that_cannot_be_run_stops_nothing(
  shared, whole, tmp_path, monkeypatch
):
  benchmark, evaluator = shared
  monkeypatch.setattr(evaluator.engine, "policies", {})
  methods = [
    *methods_of("cacovid", "uniform", "fastv"),
    own("grumbling", grumbling),
    own("asks", grumbling, requires=frozenset(["weather"])),
    own("keys", grumbling, requires=frozenset(["vision_keys"])),
  ]
  path = tmp_path / "answers.jsonl"
  failures, answers = ask(shared, methods, path)
  reasons = {place: failure.reason for place, failure in failures.items()}
  assert set(reasons) == {
    (name, ratio)
    for name in ("cacovid", "fastv", "asks", "keys")
    for ratio in RATIOS
  } | {("grumbling", 0.1)}
  assert "needs a trained policy" in reasons["cacovid", 0.1]
  assert "needs 'weather'" in reasons["asks", 0.1]
  assert "needs vision keys" in reasons["keys", 0.1]
  assert reasons["grumbling", 0.1] == "grumbling: needs at least 10 tokens"
  # One of three layers sees all 64 tokens, the others one at least.
  lowest = failures["fastv", 0.1].minimum_ratio
  assert (64 + 2) / (3 * 64) <= lowest <= 0.344
  assert f"{lowest:.4f}" in reasons["fastv", 0.1]
  # Others have all their answers, and the ledger nothing but answers.
  assert len(answers) == len(benchmark.questions) * (1 + 2 + 1)
  before = path.read_bytes()
  assert ask(shared, methods, path)[0] == failures
  assert path.read_bytes() == before
  table = tabulate(
    benchmark, evaluator, answers, methods, seeds=(0,), failures=failures
  )
  assert list(table["methods"]) == [m.label for m in methods]
  for name, row in table["methods"].items():
    for ratio in RATIOS:
      cell = row[results.ratio_key(ratio)]
      ok = (name, ratio) not in failures
      assert (cell["status"] == "ok") == ok == ("accuracy" in cell)
      if not ok:
        assert cell["status"] == reasons[name, ratio]
  assert table["methods"]["fastv"]["0.10"]["minimum_ratio"] == 0.3438
  assert not table["paired"]  # Nothing to compare with.
  json.dumps(table, allow_nan=False)


def test_what_fails_on_the_way_is_left_out_from_there(
  shared, tmp_path, monkeypatch
):
  """A mistake that only some questions show; the rest is answered."""
  benchmark, evaluator = shared
  known = dict(benchmark.decisive)
  last = engine_lib.by_clip(benchmark.questions)[-1].id
  del known[last]
  methods = methods_of("decisive_boxes", "uniform")
  monkeypatch.setattr(evaluator.engine, "decisive", known)
  path = tmp_path / "answers.jsonl"
  failures, answers = ask(shared, methods, path, ratios=(0.25,))
  before = path.read_bytes()
  assert ask(shared, methods, path, ratios=(0.25,))[0] == failures
  assert path.read_bytes() == before
  (failure,) = failures.values()
  assert failure.reason.endswith(f"question {last}")
  first = engine_lib.by_clip(benchmark.questions)[0].id
  for name in ("decisive_boxes", "uniform"):
    assert answer_log.Key(name, 0.25, 0, first) in answers
  assert answer_log.Key("uniform", 0.25, 0, last) in answers
  assert answer_log.Key("decisive_boxes", 0.25, 0, last) not in answers


def test_an_error_of_the_program_is_an_error(shared):
  def broken(features, *, grid, num_keep, text=None, aux=None, rng=None):
    return features.no_such_thing

  with pytest.raises(AttributeError, match="no_such_thing"):
    ask(shared, [own("broken", broken), *methods_of("uniform")])


def test_inside_the_language_model(shared, checkpoint):
  """Kept tokens are those of the last layer; the ratio is a mean of layers."""
  benchmark, evaluator = shared
  (method,) = methods_of("fastv")
  failures, answers = ask(shared, [method], ratios=(0.5,))
  assert not failures
  # 96 tokens for three layers: 64 for the first one, 16 for each other.
  for question in benchmark.questions:
    record = answers[answer_log.Key("fastv", 0.5, 0, question.id)]
    assert (record["kept"], record["equivalent"]) == (16, 0.5)
  question = benchmark.questions[1]
  found = evaluator.engine.answer(question, methods_lib.Condition(method, 0.5))
  record = answers[answer_log.Key("fastv", 0.5, 0, question.id)]
  assert found.text == record["text"]
  # What the last token looks at in the first layer, of the whole prompt.
  looked = evaluator.engine.batch([question]).vanilla(True).attention[0, 0]
  expected = np.sort(np.argsort(-np.asarray(looked), kind="stable")[:16])
  np.testing.assert_array_equal(found.trace.index, expected)
  table = tabulate(
    benchmark, evaluator, answers, [method], seeds=(0,), ratios=(0.5,)
  )
  cell = table["methods"]["fastv"]["0.50"]
  assert (cell["kept_tokens"], cell["equivalent_ratio"]) == (16, 0.5)


def test_the_questions_text_is_handed_over(shared, checkpoint):
  benchmark, evaluator = shared
  found = evaluator.engine.batch(benchmark.questions[:4])
  seen = own("reads", grumbling, requires=frozenset(["text"]))
  text = found.inputs(methods_lib.Condition(seen, 0.25, 0)).text
  tokenizer = checkpoint.tokenizer
  for row, question in enumerate(benchmark.questions[:4]):
    prompt = tokenizer.encode_prompt(question.prompt, 64)
    start, end = prompts_lib.question_span(prompt, tokenizer)
    words = tokenizer.decode(prompt.ids[start:end])
    assert words.strip() == question.prompt.strip()
    # Rows as the language model's, zeros behind them.
    np.testing.assert_array_equal(
      text[row, : end - start], found.batch.x[row, start:end]
    )
    assert np.abs(text[row, : end - start]).sum(-1).min() > 0
    assert not np.asarray(text[row, end - start :]).any()


def test_rows_of_a_reference_rounding(shared):
  """A method may keep another number of tokens than the ratio's."""

  def first(features, *, grid, num_keep, text=None, aux=None, rng=None,
            ratio=None, rounding="exact"):  # fmt: skip
    # Fewer than the bound: how many is only known at run time.
    few = jnp.minimum(num_keep, 5 + (features[0, 0] * 0).astype(jnp.int32))
    return base.take_mask(
      features, jnp.arange(features.shape[0]) < few, num_keep
    )

  method = own(
    "rounds",
    first,
    exact_budget=False,
    own_rows=lambda grid, ratio: 16,  # As many as at another of the ratios.
  )
  benchmark, evaluator = shared
  failures, answers = ask(shared, [method], ratios=(0.1,))
  assert not failures
  for question in benchmark.questions:
    assert answers[answer_log.Key("rounds", 0.1, 0, question.id)]["kept"] == 5
  table = tabulate(
    benchmark, evaluator, answers, [method], seeds=(0,), ratios=(0.1,)
  )
  cell = table["methods"]["rounds"]["0.10"]
  assert cell["kept_tokens"] == 5
  assert cell["equivalent_ratio"] == round(5 / 64, 6)
  assert cell["exact_budget"] is False


def test_clips_bring_what_methods_read_of_the_tower(
  shared, checkpoint, data_dir
):
  """Attention and keys of the tower reach the method, clip by clip."""
  benchmark, evaluator = shared

  def strongest(features, *, grid, num_keep, text=None, aux=None, rng=None):
    return base.take_top(features, aux.vision_attention, num_keep)

  method = own("strongest", strongest, requires=frozenset(["vision_attention"]))
  assert methods_lib.wanted([method, *methods_of("uniform")]) == method.needs
  fresh = tiny.engine_of(
    checkpoint, data_dir, benchmark.questions, SIZES,
    store={"want": methods_lib.wanted([method])},
    programs=evaluator.engine.programs,
  )  # fmt: skip
  with fresh.source as source:
    question = benchmark.questions[2]
    found = fresh.answer(question, methods_lib.Condition(method, 0.1))
    paid = source[question.video].extras["vision_attention"]
  expected = np.sort(np.argsort(-paid, kind="stable")[:6])
  np.testing.assert_array_equal(found.trace.index, expected)


def test_features_that_are_not_finite_are_refused_by_name(shared, monkeypatch):
  benchmark, evaluator = shared
  video = benchmark.questions[0].video
  clip = evaluator.engine.source[video]
  broken = clip.features.copy()
  broken[3, 0] = np.nan
  changed = dataclasses.replace(
    clip, arrays={**clip.arrays, "features": broken}
  )
  monkeypatch.setitem(evaluator.engine.source._clips, video, changed)
  with pytest.raises(errors.UserError, match=f"{video} hold NaN"):
    ask(shared, methods_of("uniform"))


def test_mistakes_are_one_line_before_anything_runs(shared, monkeypatch):
  _, evaluator = shared
  monkeypatch.setattr(evaluator.engine, "policies", {})
  monkeypatch.setattr(evaluator.engine, "seconds", {})

  def run(name, ratio):
    ask(shared, methods_of(name), ratios=(ratio,))

  with pytest.raises(errors.UserError, match="needs a trained policy"):
    run("cacovid", 0.1)
  with pytest.raises(errors.UserError, match="keeps no token"):
    run("random", 0.01)
  with pytest.raises(errors.UserError, match="outside"):
    run("random", 1.2)
  assert not evaluator.engine.seconds


@pytest.mark.parametrize(
  "change,match",
  [
    ({"split": "train"}, "its splits: test, validation"),
    ({"directory": "nowhere"}, "no data in nowhere"),
  ],
)
def test_missing_data_is_one_line(change, match, data_dir):
  arguments = {"directory": data_dir, "split": "test"} | change
  with pytest.raises(errors.UserError, match=match):
    benchmarks.load(**arguments)


def test_questions_of_one_clip_are_asked_together(shared):
  questions = list(shared[0].questions)
  mixed = questions[::2] + questions[1::2]
  videos = [question.video for question in engine_lib.by_clip(mixed)]
  assert videos == sorted(videos, key=[q.video for q in mixed].index)
  assert question_lib.question_hash("a") != question_lib.question_hash("b")


def test_decisive_tokens_are_read(shared):
  benchmark, _ = shared
  assert benchmark.name == "blocks"
  assert benchmark.generator_hash == "0123abcd"
  assert set(benchmark.decisive) == {q.id for q in benchmark.questions}
  path = pathlib.Path(benchmark.root) / "decisive.jsonl"
  assert path.is_file()


def test_a_row_may_be_given_a_name():
  named = methods_lib.Method.parse("paper=cacovid?importance_ratio=0.5")
  assert named.label == "paper"
  assert named.spec == "cacovid?importance_ratio=0.5"
  assert named.compressor.options == {"importance_ratio": 0.5}
  plain = methods_lib.Method.parse(" random ")
  assert plain.label == plain.spec == "random"


def test_rows_of_one_spec_are_asked_once():
  methods = [
    methods_lib.Method.parse(spec)
    for spec in ("random", "again=random", "uniform", "a=uniform")
  ]
  asked = methods_lib.conditions(methods, (0.1, 0.2), (0, 1))
  specs = [(c.method.spec, c.ratio, c.seed) for c in asked[1:]]
  assert len(specs) == len(set(specs)) == 2 * (2 + 1)
  # Every row finds its answers under its spec.
  keys = {cell.key("q") for cell in asked}
  for method in methods:
    assert methods_lib.Condition(method, 0.2, 0).key("q") in keys


def test_free_form_answers_belong_to_the_words_that_they_are_scored_by(shared):
  benchmark, evaluator = shared
  first, *rest = benchmark.questions
  assert "rouge" not in evaluator.identity(benchmark.questions)
  text = "打碎鸡蛋"
  asked = dataclasses.replace(
    first, problem_type=question_lib.FREE_FORM, options=(), answer=text
  )
  scores = {}
  for rouge in ("unicode", "public"):
    changed = copy.copy(evaluator.engine)
    changed.settings = dataclasses.replace(changed.settings, rouge=rouge)
    other = evaluator_lib.Evaluator(changed)
    # Logs of earlier versions say nothing of the public words.
    told = None if rouge == "public" else rouge
    assert other.identity([asked, *rest]).get("rouge") == told
    scores[rouge] = other._record(asked, text, "")["score"]
  assert scores == {"unicode": 1.0, "public": 0.0}


def test_a_record_says_by_what_an_answer_was_read(shared):
  benchmark, evaluator = shared
  question = dataclasses.replace(
    benchmark.questions[0], options=("red", "blue"), answer="B"
  )
  changed = copy.copy(evaluator.engine)
  changed.settings = dataclasses.replace(changed.settings, rule="own")
  other = evaluator_lib.Evaluator(changed)
  found = other._record(question, "Answer: B", "")
  assert (found["letter"], found["score"]) == ("B", 1.0)
  assert found["read_by"] == "named"
  assert "read_by" not in evaluator._record(question, "Answer: B", "")


def test_a_log_names_a_run_by_words_that_do_not_follow_the_code():
  """Those of logs that exist: an attribute may be renamed, a log may not."""
  question = question_lib.Question(
    id="q", video="clips/a.mp4", question="Why?", options=("x", "y"), answer="B"
  )
  found = evaluator_lib.known(question)
  assert json.loads(json.dumps(found)) == {
    "answer": "B",
    "category": None,
    "duration": None,
    "groups": [],
    "id": "q",
    "options": ["x", "y"],
    "problem_type": "multiple choice",
    "prompt": "",
    "question": "Why?",
    "source": "",
    "stream": "",
    "video": "a",
  }
  settings = engine_lib.Settings(num_frames=4, batch_size=2, max_new_tokens=3)
  assert settings.identity == {
    "num_frames": 4, "batch_size": 2, "max_new_tokens": 3, "rule": "paper"
  }  # fmt: skip
