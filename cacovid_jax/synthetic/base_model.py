"""From a config to the base model's checkpoint directory."""

import json
import pathlib

import jax.numpy as jnp

from cacovid_jax import config as config_lib
from cacovid_jax import errors, metrics
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, llava_onevision, qwen2, siglip
from cacovid_jax.synthetic import packing, pretraining, world
from cacovid_jax.synthetic import tokenizer as tokenizer_training

# Safetensors of half precision keep the shipped directory small; bfloat16
# because float16 would round small weights to zero.
_STORED = jnp.bfloat16


def model_of(config, tokenizer):
  """Returns the model that a config describes, with the tokenizer's ids."""
  vision = siglip.SiglipConfig(**config.vision)
  text = qwen2.Qwen2Config(
    vocab_size=config.vocab_size, tie_embeddings=True, **config.text
  )
  shape = llava_onevision.LlavaOnevisionConfig(
    vision=vision,
    text=text,
    image_token_id=tokenizer.token_id("<image>"),
    video_token_id=tokenizer.token_id("<video>"),
  )
  return llava_onevision.LlavaOnevisionModel(
    shape, jnp.dtype(config.dtype), config.attention, config.remat
  )


def pretrain(config, workdir):
  """Trains the base model; WORKDIR/base_model holds it at the end.

  Every probe writes the checkpoint anew, so that a killed run leaves the last
  one behind.
  """
  workdir = pathlib.Path(workdir)
  config_lib.claim_workdir(workdir, config)
  directory = workdir / "base_model"
  tokenizer_training.train(
    packing.corpus(),
    config.vocab_size,
    directory,
    image_size=config.vision.image_size,
    patch_size=config.vision.patch_size,
    max_length=config.text.max_positions,
    num_frames=world.NUM_FRAMES,
  )
  tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  if tokenizer.vocab_size > config.vocab_size:
    raise errors.UserError(
      f"config.vocab_size {config.vocab_size} is below the tokenizer's"
      f" {tokenizer.vocab_size}; raise it"
    )
  model = model_of(config, tokenizer)
  ends = ("<|im_end|>", "<|endoftext|>")
  with (
    metrics.MetricsWriter(workdir, 0) as writer,
    progress_lib.Progress(config.pretrain.num_steps) as progress,
  ):

    def on_metrics(step, values):
      writer.write_scalars(step, values)
      progress.update(step, {k: values[k] for k in ("hit_full", "hit_pruned")})

    def on_probe(step, params, rows):
      for variant, row in rows.items():
        writer.write_scalars(
          step, {f"{variant}/{rule}": value for rule, value in row.items()}
        )
        shown = ", ".join(f"{rule} {value:.3f}" for rule, value in row.items())
        print(f"step {step}, {variant}: {shown}", flush=True)
      checkpoints.save(
        directory,
        model.config,
        params,
        eos_ids=[tokenizer.token_id(token) for token in ends],
        pad_id=tokenizer.token_id(ends[1]),
        dtype=_STORED,
      )
      (workdir / "probe.json").write_text(json.dumps(rows, indent=2) + "\n")

    pretraining.train(
      model,
      directory / "tokenizer.json",
      config.pretrain,
      on_metrics=on_metrics,
      on_probe=on_probe,
    )
  return directory
