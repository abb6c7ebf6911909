"""Pretraining of the small base model: from a config to its checkpoint.

Axes: B clips, T frames, N video tokens, Q questions of a clip, M decisive
tokens of a question, K kept video tokens, D width.
"""

import dataclasses
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from optax import contrib

from cacovid_jax import base_config, errors, files
from cacovid_jax import config as config_lib
from cacovid_jax import metrics as metrics_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.synthetic import base_models, packing, questions, world
from cacovid_jax.synthetic import losses as losses_lib
from cacovid_jax.training import checkpointing, preemption


def pretrain(config, workdir):
  """Trains the base model; WORKDIR/base_model holds that of the last probe.

  Goes on from what a workdir holds: on as many devices, it ends as a run that
  nothing stopped. A SIGTERM ends it with exit code 143, all saved.
  """
  workdir = pathlib.Path(workdir)
  with files.claim(workdir / "pretrain", "pretraining", what=workdir):
    return _pretrain(config, workdir)


def _pretrain(config, workdir):
  config_lib.claim_workdir(workdir, config)
  directory = workdir / "base_model"
  family = base_models.of(config)
  pack = packing_of(config, directory)
  stage = pack.stage
  family.write_files(config, pack, directory)
  if path := config.pretrain.init:  # Its weights know the words of its own.
    _take_tokenizer(path, directory)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  model = base_models.model_of(config, tokenizer)
  ends = [tokenizer.token_id(end) for end in ("<|im_end|>", "<|endoftext|>")]
  # Safetensors of half precision keep the shipped directory small; bfloat16
  # because float16 would round small weights to zero.
  stored = {"eos_ids": ends, "pad_id": ends[1], "dtype": jnp.bfloat16}
  saved, given = workdir / "checkpoints", config_lib.config_hash(config)
  state = init_state(model, config.pretrain, stage)
  start, state = _resumed(saved, state, given)
  writer = metrics_lib.MetricsWriter(workdir, start)
  num_steps = config.pretrain.num_steps
  progress = progress_lib.Progress(num_steps, start=start)
  with writer, progress, preemption.watched() as reached:
    prompts = base_models.prompts_of(family, model, tokenizer, pack)
    trained = train(prompts, tokenizer, pack, config.pretrain, state, start)
    for step, state, metrics, rows in trained:
      if metrics:
        writer.write_scalars(step, metrics)
        shown = {name: metrics[name] for name in ("hit_full", "hit_pruned")}
        progress.update(step, shown)
      for variant, row in rows.items():
        scalars = {f"{variant}/{rule}": value for rule, value in row.items()}
        writer.write_scalars(step, scalars)
        shown = ", ".join(f"{rule} {value:.3f}" for rule, value in row.items())
        print(f"step {step}, {variant}: {shown}", flush=True)
      stop = reached(step) and step < num_steps
      if rows or stop:
        if not np.isfinite(optax.tree.norm(state["params"])):
          raise _diverged(step)
        # Before the checkpoint, behind which it would not be made again.
        if rows:
          params = state["params"]["model"]
          checkpoints.save(directory, model.config, params, **stored)
          files.write_json(workdir / "probe.json", rows)
        told = {"devices": jax.device_count()}
        checkpointing.save(saved, step, state, told, config_hash=given, keep=1)
      if stop:
        raise SystemExit(base_config.get_config().ckpt.exit_code)
  return directory


def _take_tokenizer(path, directory):
  found = pathlib.Path(path) / "tokenizer.json"
  errors.check(
    found.exists(),
    f"pretrain.init={path} has no {found.name}; give the base_model of an"
    " earlier pretraining",
  )
  files.write(directory / found.name, found.read_bytes())


def _resumed(folder, state, config_hash):
  """Returns (steps done, state) of the newest checkpoint, or what was given."""
  found = checkpointing.restore_latest(folder, state, config_hash=config_hash)
  if found is None:
    return 0, state
  told = checkpointing.read_manifest(folder, found[0])["metadata"]["devices"]
  if told != jax.device_count():
    raise errors.UserError(
      f"{folder}: pretraining began on {told} devices, on which its noise"
      f" depends, and here are {jax.device_count()}; go on with as many, or"
      " give another --workdir"
    )
  return found


def _diverged(step: int) -> errors.UserError:
  return errors.UserError(
    f"pretraining: the loss is not finite at step {step}; lower"
    " config.pretrain.lr"
  )


def make_tx(config):
  """Returns (optimiser, schedule) of a pretraining run.

  Muon for all kernels, Adam with Nesterov's momentum for the rest; kernels
  alone decay. After 2 600 steps 0.91 of answers are right, and 0.45 by AdamW
  alone (docs/results.md).
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.lr, config.warmup_steps, config.num_steps, config.lr * 0.01
  )
  matrix = contrib.MuonDimensionNumbers(-2, -1)
  muon = contrib.muon(
    schedule,
    weight_decay=config.weight_decay,
    adam_b2=0.98,
    muon_weight_dimension_numbers=functools.partial(
      jax.tree_util.tree_map_with_path,
      lambda path, _: matrix if path[-1].key == "kernel" else None,
    ),
    consistent_rms=0.2,  # Steps as large as AdamW's, whose rates it takes.
  )
  faster = optax.stateless(
    lambda updates, unused_params: _scale_qk_norms(updates, config.norm_rate)
  )
  return optax.chain(optax.clip_by_global_norm(1.0), muon, faster), schedule


def _scale_qk_norms(tree, factor):
  """Returns arrays by name, those of q and k norms times a factor."""

  def scaled(path, x):
    own = any(key.key in ("q_norm", "k_norm") for key in path)
    return x * factor if own else x

  return jax.tree_util.tree_map_with_path(scaled, tree)


def packing_of(config, directory) -> packing.PackingConfig:
  """Returns what batches of a pretraining config are like."""
  family, own = base_models.of(config), config.pretrain
  path = os.path.join(directory, "tokenizer.json")
  given = {"seed": own.seed, "num_steps": own.num_steps, **own.packing}
  pack = packing.PackingConfig(
    tokenizer_file=path, separator=family.separator, **given
  )
  times = tuple(times for times, _ in family.lengths(pack.stage))
  return dataclasses.replace(pack, times=times)


def init_params(rng, model, stage=world.SMALL):
  """Returns all parameters; residual writes start small, as depth asks."""
  model_rng, head_rng = jax.random.split(rng)
  params, text = model.init(model_rng), model.config.text
  language = params["language_model"]
  scale = (2 * text.num_layers) ** -0.5
  for name in ("o_proj", "down_proj"):
    kernel = language["layers"][name]["kernel"]
    language["layers"][name]["kernel"] = kernel * scale
  language["embed_tokens"] = language["embed_tokens"] * 4.0
  token = jnp.zeros((1, text.hidden_size))
  words = jnp.zeros((len(losses_lib.words_of(stage)), text.hidden_size))
  head = losses_lib.LabelHead().init(head_rng, token, words)
  asked = losses_lib.AskedHead().init(head_rng, token)
  return {"model": params, "head": head["params"], "asked": asked["params"]}


def init_state(model, config, stage=world.SMALL):
  """Returns {"params", "opt_state"} of step 0, on all devices."""
  # Placed as `make_update` returns it, or that would compile a second time.
  whole = jax.sharding.NamedSharding(mesh_lib.make_mesh(), P())
  params = init_params(jax.random.key(config.seed), model, stage)
  params = _scale_qk_norms(params, config.norm_scale)
  if path := config.init:
    given = model.config, jnp.float32
    params["model"] = checkpoints.load_params(path, *given, layers="stacked")
  params = jax.device_put(params, whole)
  opt_state = jax.jit(make_tx(config)[0].init)(params)
  return {"params": params, "opt_state": jax.device_put(opt_state, whole)}


def make_update(prompts, tx, config, word_ids, mesh, stage=world.SMALL):
  """Returns the jitted step; its batch is split over the mesh's axis `data`."""

  def loss_fn(params, rng, batch):
    given = {"config": config, "word_ids": word_ids, "stage": stage}
    losses, right = losses_lib.answer_losses(
      prompts, params, rng, batch, **given
    )
    total = sum(config.weights[name] * loss for name, loss in losses.items())
    metrics = {f"loss_{name}": loss for name, loss in losses.items()}
    letters = (~batch["in_words"] & (batch["kind"] >= 0)).astype(jnp.float32)
    for name in ("full", "pruned"):
      share = (right[name] * letters).sum() / jnp.maximum(letters.sum(), 1)
      metrics[f"hit_{name}"] = share
    metrics["hit_told"] = right["told"].mean()
    return total, metrics

  def update(state, step, batch):
    params, opt_state = state["params"], state["opt_state"]
    rng = jax.random.fold_in(jax.random.key(config.seed), step)
    rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, rng, batch)
    grads, metrics = jax.lax.pmean((grads, metrics), "data")
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state}, metrics

  specs = (P(), P(), P("data"))
  update = mesh_lib.map_over_data(update, mesh, specs, P())
  return jax.jit(update, donate_argnums=0)


def make_probe(prompts, rules, mesh, stage=world.SMALL):
  """Returns a jitted probe: hits of lettered questions by `probe_rules`.

  With a head for it, "asked_0.10" is the share of the decisive tokens that the
  best tenth of the asked head holds: a policy starts from what it reads.
  """

  def probe(params, rng, batch):
    rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))
    frame_rng, rule_rng = jax.random.split(rng)
    pixels = losses_lib.draw_frames(frame_rng, batch, stage)
    weights = params["model"]
    video = prompts.encode(weights, pixels.astype(prompts.model.dtype))
    ids, target, which = batch["ids"], batch["target"], batch.get("head")
    logits = prompts.full_logits(weights, video, ids, which)
    hits = {"vanilla": losses_lib.hits(logits, ids, target)}
    if "asked" in params:
      logits, decisive = losses_lib.asked_logits(
        prompts, params, video, batch, ids.shape[1]
      )
      best = jnp.sort(logits)[:, -(prompts.num_video // 10), None]
      found = (decisive * (logits >= best)).sum(-1) / decisive.sum(-1)
      hits["asked_0.10"] = found.reshape(ids.shape[:2])
    rngs = jax.random.split(rule_rng, ids.shape[:2])
    for name, rule in rules.items():
      index = jax.vmap(jax.vmap(rule))(rngs, batch["decisive"])
      valid = jnp.ones(index.shape, bool)
      logits = prompts.pruned_logits(
        weights, video, ids, index, valid, which=which
      )
      hits[name] = losses_lib.hits(logits, ids, target)
    return hits

  specs = (P(), P(), P("data"))
  return jax.jit(mesh_lib.map_over_data(probe, mesh, specs, P("data")))


def probe_rules(num_video):
  """Returns {name: (rng, decisive int[M]) of one question -> int32[K]}."""

  def random(num_keep, rng, unused_decisive):
    drawn = jax.random.choice(rng, num_video, (num_keep,), replace=False)
    return jnp.sort(drawn)

  def decisive_first(num_keep, rng, decisive):
    count, even = jnp.full((1, 1), num_keep), jnp.zeros((1, 1, num_video))
    index, _ = losses_lib.random_subsets(
      rng, decisive[None, None], count, even, num_keep=num_keep
    )
    return index[0, 0]

  return {
    "random_0.10": functools.partial(random, num_video // 10),
    "decisive_0.10": functools.partial(decisive_first, num_video // 10),
    "decisive_0.05": functools.partial(decisive_first, num_video // 20),
  }


def summarise(hits, kinds):
  """Returns {rule: accuracy} plus vanilla accuracy by question kind."""
  asked = kinds >= 0
  rows = {name: float(h[asked].mean()) for name, h in hits.items()}
  for i, kind in enumerate(questions.KINDS):
    chosen = kinds == i
    if chosen.any():
      rows[f"vanilla/{kind}"] = float(hits["vanilla"][chosen].mean())
      if "decisive_0.10" in hits:
        rows[f"decisive/{kind}"] = float(hits["decisive_0.10"][chosen].mean())
  return rows


def held_out(config: packing.PackingConfig, variant: str, num_clips: int):
  """Returns a batch of lettered questions that training never sees."""
  rng = np.random.default_rng((config.seed, 2**31, len(variant)))
  return packing.lettered(config, rng, variant, num_clips)


def train(prompts, tokenizer, pack, config, state, start=0):
  """Pretrains from an `init_state`, or a later one, of which `start` are done.

  `prompts` are `packed.PackedPrompts`, which read the batches of `pack`.

  Yields (step, state, {name: value}, {variant: {rule: accuracy}}): values every
  config.log_every steps and accuracies every config.probe_every, both at the
  end, else empty. A state lives until the next one is asked for.

  Raises:
    UserError: the loss is not finite.
  """
  stage = pack.stage
  word_ids = losses_lib.word_ids(tokenizer, stage)
  mesh = mesh_lib.make_mesh()
  shared = {"batch_size": pack.batch_size, "text_only": pack.text_only}
  for name, size in (shared | {"probe_clips": config.probe_clips}).items():
    if size % mesh.size:
      raise errors.UserError(
        f"pretraining: {name} {size} cannot be shared by {mesh.size} devices:"
        " give a multiple of them"
      )
  split = jax.sharding.NamedSharding(mesh, P("data"))
  tx, schedule = make_tx(config)
  update = make_update(prompts, tx, config, word_ids, mesh, stage)
  probe = make_probe(prompts, probe_rules(stage.num_tokens), mesh, stage)
  tests = {
    name: jax.device_put(held_out(pack, name, config.probe_clips), split)
    for name in pack.variants
  }
  since, seen, workers = time.time(), start, config.num_workers
  stream = packing.batches(pack, first_step=start, num_workers=workers)
  for step, batch in enumerate(stream, start=start + 1):
    batch = jax.device_put(batch, split)
    state, metrics = update(state, jnp.int32(step - 1), batch)
    last, values, rows = step == config.num_steps, {}, {}
    if step % config.log_every == 0 or last:
      values = {name: float(value) for name, value in metrics.items()}
      if not np.isfinite(list(values.values())).all():
        raise _diverged(step)
      rate = (step - seen) / (time.time() - since)
      seen, since = step, time.time()
      values |= {"lr": float(schedule(step - 1)), "steps_per_second": rate}
    if step % config.probe_every == 0 or last:
      for name, held in tests.items():
        hits = probe(state["params"], jax.random.key(1), held)
        kinds = np.asarray(held["kind"])
        rows[name] = summarise(jax.device_get(hits), kinds)
    yield step, state, values, rows
