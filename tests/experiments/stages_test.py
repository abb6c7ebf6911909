"""Stages beside PyTorch engines: equal outputs, limits, tables, going on."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cacovid_jax import errors
from cacovid_jax.compressors import selection_ops
from cacovid_jax.data import answer_log
from cacovid_jax.evals import cost
from cacovid_jax.inference import clips
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import checkpoints
from configs import llava_onevision as training_config
from experiments import (
  efficiency_table,
  gpu_check,
  made_up,
  scaling,
  stages,
  torch_peers,
  torch_twin,
  training_stage,
)
from tests.experiments import commands

SIZE = efficiency_table.SIZES["tiny"]


def made_of(size, folder):
  """Returns a prompt to weights of which every one matters, in a folder."""
  model = checkpoints.make_model(size.config())
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32),
    model.init(jax.random.key(0)),
  )
  checkpoints.save(folder, model.config, params, eos_ids=[1], pad_id=0)
  return made_up.subject(checkpoints.load(folder), size.grid)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  return made_of(SIZE, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen3")
  return made_of(efficiency_table.SIZES["qwen3-tiny"], folder)


def same(theirs, ours):
  np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "name,model",
  [("transformers", "subject"), ("transformers", "qwen3"), ("twin", "subject")],
)
@torch.no_grad()
def test_a_peer_computes_what_ours_does(name, model, request):
  """Float32, the same weights; the first two tokens behind the prompt."""
  subject = request.getfixturevalue(model)
  peer, batch = torch_peers.Peer(name, "cpu", subject), subject.batch
  model, params = subject.checkpoint.model, subject.checkpoint.params
  features, deep = peer.encode()
  found = subject.encode()
  same(features, found[clips.FEATURES])
  assert len(deep) == model.num_deep
  for one, own in zip(deep, found.get(clips.DEEP, ()), strict=True):
    same(one, own)
  same(peer.prompt.x[0], batch.x[0])
  ours = stages.Ours(subject)
  scores = ours.function("scores", 1.0)[0]()
  for theirs, own in zip(peer.scored(peer.prompt), scores, strict=True):
    same(theirs, own[0])
  logits, cache = peer.read(peer.prompt, room=2)
  length = batch.x.shape[1]
  own, own_cache, _ = model.prefill(
    params, batch.x, batch.positions, batch.lengths, cache_length=length + 2,
    deep=batch.deep, video_rows=batch.video_rows,
  )  # fmt: skip
  same(logits, own)
  positions = peer.prompt.positions[..., -1:]
  for step in range(2 if name == "twin" else 1):
    ids = np.array([7 + step])
    at = torch.tensor([length + step])
    given = torch.from_numpy(ids), positions + 1 + step, at, cache
    where = batch.next_position[:, None] + step
    where = jnp.broadcast_to(where, (1, model.num_position_rows))
    own, own_cache = model.decode_step(params, ids, where, own_cache)
    same(peer.engine.decode(*given), own)


@torch.no_grad()
def test_a_peer_prunes_feature_maps_as_ours_do(qwen3):
  """The peer's choice, read by both; times and marks stay."""
  peer, batch = torch_peers.Peer("transformers", "cpu", qwen3), qwen3.batch
  pruned = peer.pruned(peer.prompt, 0.25)
  is_video = pruned.more["is_video"].numpy()
  rows = batch.x.shape[1] - 96 + 24
  assert (len(is_video), is_video.sum()) == (rows, 24)
  kept = np.array([
    np.flatnonzero((batch.features[0] == x.numpy()).all(axis=1)).item()
    for x in pruned.x[0][is_video]
  ])  # fmt: skip
  for one, own in zip(pruned.more["deep"], batch.deep[0], strict=True):
    same(one, own[kept])
  own, _, _ = programs_lib.read_rows(
    qwen3.checkpoint.model, qwen3.checkpoint.params, batch,
    kept[None, None].astype(np.int32), np.array([24]), room=0,
  )  # fmt: skip
  logits, _ = peer.read(pruned)
  same(logits, own)
  # All combinations of a rollout, and a prompt without the maps.
  rollout = peer.function("rollout", 1.0)[0]()
  assert rollout.shape == (stages.ROLLOUTS, own.shape[1])
  np.testing.assert_allclose(rollout, rollout[:1].expand_as(rollout), rtol=1e-5)
  blank = [torch.zeros_like(one) for one in pruned.more["deep"]]
  more = pruned.more | {"deep": blank}
  assert not np.allclose(peer.read(pruned._replace(more=more))[0], own)


def test_made_up_prompts_tell_times(qwen3):
  """Seven tokens of a time and two marks of each of the temporal patches."""
  batch, config = qwen3.batch, qwen3.checkpoint.model.config
  ids = np.asarray(batch.ids[0])
  start, video, end = (
    np.flatnonzero(ids == getattr(config, f"{name}_token_id"))
    for name in ("vision_start", "video", "vision_end")
  )
  np.testing.assert_array_equal(video, batch.video_rows[0])
  np.testing.assert_array_equal(start, 25 + 7 + 33 * np.arange(4))
  np.testing.assert_array_equal(end, start + 25)
  assert len(ids) == 75 + 96 + 4 * 9
  assert made_up.rows_beside(qwen3.checkpoint.model, qwen3.grid) == 75 + 4 * 9


def test_a_peer_keeps_text_and_the_largest_gaps():
  token = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 1.0], [0.0, 2.0]])
  text, video = torch.tensor([0, 1, 4, 7]), torch.tensor([2, 3, 5, 6])
  rows = torch_twin.kept_rows((None, token), 2, text, video)
  assert rows.tolist() == [0, 1, 3, 4, 6, 7]


def test_limits_are_work_over_speed(subject):
  """Three layers of two matrices of 32 x 32, two of 32 x 16, three of 32 x 48,
  a row seeing itself and those before it; four bytes a weight."""
  weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
  rows, kept = 204, 76 + 64
  pairs = sum(range(1, kept + 1))
  prefill = 3 * (2 * kept * weights + 4 * pairs * 32) + 2 * 32 * 64
  limit = stages.limits(subject, cost.Speed(1e3, 1e6))
  assert limit("prefill", 0.5) == pytest.approx(prefill)
  read = 4 * (3 * weights + 32 * 64 + 3 * rows * 2 * 16)
  assert limit("decode", 1.0) == pytest.approx(read / 1e3)
  first = limit("tower", 1.0) + limit("scores", 1.0) + prefill
  assert limit("first_token", 0.5) == pytest.approx(first)
  assert limit("clip", 1.0) == 0


def test_loading_stands_beside_a_plain_read(subject, monkeypatch):
  ours, read = stages.Ours(subject), []
  again = ours.function("load", 1.0)[0]()
  jax.tree.map(np.testing.assert_array_equal, again, subject.checkpoint.params)
  with monkeypatch.context() as patched:
    patched.setattr(stages, "read_plainly", read.append)
    assert stages.timed(ours, "load", 1.0, 9)["limit_ms"] > 0
  folder = subject.checkpoint.identity["path"]
  assert read == [folder] * (1 + 3)


def test_a_plain_read_takes_every_byte(tmp_path):
  (tmp_path / "a.safetensors").write_bytes(bytes(2**26 + 1))
  (tmp_path / "b.safetensors").write_bytes(b"12")
  assert stages.read_plainly(tmp_path) == 2**26 + 3


def test_the_table_has_ratios_and_shares_of_the_limit():
  own = dict(engine="ours", stage="prefill", ratio=0.25, status="ok", ms=8.0,
             low=7.5, high=9.0, first_s=2.5, limit_ms=2.0)  # fmt: skip
  peer = dict(engine="twin", stage="prefill", ratio=0.25, status="ok", ms=10.0)
  line = stages.markdown([own, peer]).splitlines()[2]
  assert line == "| prefill | 25% | 8 | 7.5 to 9 | 2.5 | 2 | 25% | 10 | 0.80 |"


def test_rollouts_are_read_as_an_answer_is(subject):
  """From a token of each frame, as the ratio asks at this size."""
  assert training_stage.ratio_of(SIZE.grid) == 1 / 16
  kept = training_stage.rollout_tokens(SIZE.grid)
  assert kept.tolist() == [16 * frame for frame in range(8)]
  logits = stages.Ours(subject).function("rollout", 1.0)[0]()
  take = jax.vmap(selection_ops.take, (0, None))
  chosen = take(subject.batch.features, jnp.asarray(kept))
  given = subject.checkpoint.params, subject.batch, chosen
  (answer,) = subject.programs.answer(*given)
  assert logits.shape[0] == stages.ROLLOUTS
  assert set(logits.argmax(-1).tolist()) == {int(answer[0])}


def test_a_training_at_an_adaptive_ratio_grows(subject, tmp_path):
  config = training_config.get_config("debug")
  config.ratio.rungs, config.ratio.start = (1 / 16, 1 / 8), 1 / 16
  step = training_stage.trainer(subject, config, tmp_path, adaptive=True)
  *_, metrics = step()
  np.testing.assert_allclose(metrics.mean["ratio"], [1 / 16, 1 / 8])
  limit = stages.limits(subject, cost.Speed(1e3, 1e6), config)
  most = limit("train_adaptive", 1.0)
  assert most > limit("train", 1.0) > 0
  config.ratio.start = 1 / 8  # What lies below is never tried.
  assert stages.limits(subject, cost.Speed(1e3, 1e6), config)(
    "train_adaptive", 1.0
  ) > most  # fmt: skip


def test_a_training_is_the_packages_own(subject, tmp_path):
  config = training_config.get_config("debug")
  step = training_stage.trainer(subject, config, tmp_path)
  ids, rewards, metrics = step()
  # Two iterations of eight combinations, answers of two tokens.
  assert ids.shape == (1, 2, 8, 2) and rewards.shape == (1, 2, 8)
  np.testing.assert_allclose(metrics.mean["ratio"], 1 / 16)
  step()  # From where the first one ended.


FLAGS = dict(
  size="tiny", methods="",
  stages="load,clip,tower,select,rollout,first_token,decode",
  kept="1,0.5", repeats=1, peers="twin,transformers", torch_device="cpu",
  tflops=1.0, gbps=1.0,
)  # fmt: skip


def test_a_table_goes_on(subject, tmp_path, monkeypatch, capsys):
  flags = FLAGS | dict(
    workdir=tmp_path, weights=subject.checkpoint.identity["path"]
  )
  commands.run(efficiency_table, **flags)
  rows = json.loads((tmp_path / "stages.json").read_text())["stages"]
  assert len(rows) == 3 * (4 + 1 + 2 + 2)
  for row in rows:
    has_one = row["engine"] == "ours" or row["stage"] not in ("load", "clip")
    assert row["status"] == ("ok" if has_one else "not measured")
  assert all((tmp_path / name).stat().st_size for name in stages.FILES)
  assert "ours / twin" in capsys.readouterr().out
  # Nothing is made again but what could not be measured.
  made = lambda *args: pytest.fail("measured again")  # noqa: E731
  monkeypatch.setattr(stages.Ours, "function", made)
  monkeypatch.setattr(torch_peers.Peer, "_decode", made)
  commands.run(efficiency_table, **flags)
  again = json.loads((tmp_path / "stages.json").read_text())["stages"]
  assert again == rows


def test_a_table_of_the_other_family(qwen3, tmp_path):
  flags = FLAGS | dict(
    workdir=tmp_path, weights=qwen3.checkpoint.identity["path"],
    size="qwen3-tiny", peers="transformers", kept="0.5",
  )  # fmt: skip
  commands.run(efficiency_table, **flags)
  rows = json.loads((tmp_path / "stages.json").read_text())["stages"]
  missing = [row["stage"] for row in rows if row["status"] != "ok"]
  assert len(rows) == 2 * 7 and missing == ["load", "clip"]


def test_a_peer_that_fails_is_made_once_and_stops_no_other():
  made = []

  def fails(name):
    made.append(name)
    raise TypeError("no such\nargument")

  peer = types.SimpleNamespace(
    function=lambda *cell: (lambda: 0, None, 1), facts={}, wait=lambda x: x
  )
  engines = {name: functools.partial(fails, name) for name in ("twin", "other")}
  engines |= {"last": lambda: peer}
  cells = [("prefill", 1.0), ("prefill", 0.1)]
  rows = answer_log.AnswerLog(None, {})
  found = stages.measure(engines, cells, rows, 1)
  assert made == ["twin", "other"]
  told = "TypeError: no such argument"
  assert [row["status"] for row in found] == [told] * 4 + ["ok"] * 2
  with pytest.raises(TypeError):
    stages.measure({stages.OURS: engines["twin"]}, cells, rows, 1)


def test_what_does_not_fit_is_written_as_such(subject, tmp_path, monkeypatch):
  real, broken = stages.Ours._select, []

  def select(self, ratio, batch=None):
    if len(self._batch.x) == 2 and not broken:
      raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7")
    return real(self, ratio, batch)

  monkeypatch.setattr(stages.Ours, "_select", select)
  flags = dict(size="tiny", frames="2,4", batches="1,2", repeats=1)
  flags |= dict(workdir=tmp_path, weights=subject.checkpoint.identity["path"])
  commands.run(scaling, **flags)
  lines = (tmp_path / "table.md").read_text().splitlines()
  cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
  assert [line[1:3] for line in cells] == [["2", "1"], ["4", "1"], ["2", "2"]]
  out = "out of the device's memory"
  assert [line.count(out) for line in cells] == [0, 0, 2]
  assert float(cells[2][3]) > 0 and float(cells[2][6]) > 0
  tower, select, quarter, whole, gain = map(float, cells[0][3:8])
  sooner = (tower + whole) / (tower + select + quarter)
  assert gain == pytest.approx(sooner, rel=0.01, abs=0.006)
  assert not cells[2][7]
  first = json.loads((tmp_path / "results.json").read_text())["rows"]
  broken.append("mended")
  commands.run(scaling, **flags)
  again = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [row["status"] for row in again] == ["ok"] * 12
  assert [row for row in first if row["status"] == "ok"] == [
    new for new, row in zip(again, first, strict=True) if row["status"] == "ok"
  ]
  for name in ("frames.svg", "batches.svg"):
    assert "prefill 25%" in (tmp_path / name).read_text()


@pytest.mark.parametrize(
  "module,changes,message",
  [
    (efficiency_table, dict(stages="towel"), "--stages=towel: choose of load"),
    (efficiency_table, dict(peers="twins"), "twins.*: choose of trans"),
    (efficiency_table, dict(kept="1,2"), "ratio 2.0 is outside"),
    (efficiency_table, dict(size="qwen3-tiny"), "peer twin is of LlavaOne"),
    (
      efficiency_table,
      dict(size="qwen-tiny", peers="transformers"),
      "is of LlavaOnevision and Qwen3VL; leave it out",
    ),
    (efficiency_table, dict(torch_device="cuda"), "add --torch_device=cpu"),
    (scaling, dict(frames=""), "--frames=.*whole numbers above 0"),
    (scaling, dict(batches="0"), "--batches=.*whole numbers above 0"),
    (scaling, dict(size="qwen-tiny"), "choose ov-7b"),
  ],
)
def test_mistakes_are_named(tmp_path, module, changes, message):
  flags = FLAGS if module is efficiency_table else dict(size="tiny")
  with pytest.raises(errors.UserError, match=message):
    commands.run(module, workdir=tmp_path, **{**flags, **changes})


def test_without_pytorch_the_extra_is_named(tmp_path, monkeypatch):
  def missing(name):
    raise ImportError("No module named 'torch'")

  monkeypatch.setattr(stages.importlib, "import_module", missing)
  with pytest.raises(errors.UserError, match=r"cacovid_jax\[hf\]"):
    commands.run(efficiency_table, workdir=tmp_path, **FLAGS)


def test_a_sound_machine_passes(capsys):
  assert gpu_check.main(gpu_check.COMMAND.parse(["gpu_check"])) == 0
  told = capsys.readouterr().out
  assert "no accelerator is there" in told and "TFLOP/s" in told
  assert told.endswith("gpu_check: pass\n") and "FAILED" not in told


def test_a_wrong_kernel_and_another_letter_fail(monkeypatch, capsys):
  right = gpu_check.attention.attention

  def wrong(q, k, v, *, causal, lengths=None, **options):
    return right(q, k, v, causal=False, lengths=lengths)

  monkeypatch.setattr(gpu_check.attention, "attention", wrong)
  monkeypatch.setattr(gpu_check, "letters", lambda *args: "CB-BDDAA")
  assert gpu_check.main(None) == 1
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == (
    "gpu_check: failed: attention of prefill; gradient of attention of prefill;"
    " letters, float32"
  )


def test_the_reference_of_attention_by_hand():
  q, v = jnp.zeros((1, 3, 2, 4)), jnp.arange(12.0).reshape(1, 3, 1, 4)
  lengths = jnp.array([2])
  whole = gpu_check.plain_attention(q, v, v, False, lengths)
  np.testing.assert_allclose(whole[0, 0], [[2, 3, 4, 5]] * 2, atol=1e-6)
  causal = gpu_check.plain_attention(q, v, v, True, lengths)
  np.testing.assert_allclose(causal[0, :2, 1], [v[0, 0, 0], whole[0, 0, 0]])
