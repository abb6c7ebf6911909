"""Programs that read prompts and programs that decode."""

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import simple
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.parallel import mesh as mesh_lib
from experiments import made_up
from tests.evals import tiny

NEW = 3


def test_where_their_options_differ_decoding_is_a_program_of_its_own(
  checkpoint, monkeypatch
):
  model, params = checkpoint.model, checkpoint.params
  rng = np.random.default_rng(0)
  shape = tiny.NUM_VIDEO, model.config.text.hidden_size
  features = jnp.asarray(rng.standard_normal(shape), model.dtype)
  batch = made_up.prompt(model, params, features, tiny.GRID, rng)
  batch = jax.tree.map(lambda leaf: leaf[None], batch)

  def answers():
    programs = programs_lib.Programs(checkpoint, NEW)
    compressor = simple.Uniform()
    inputs = made_up.inputs(tiny.GRID, model.config)
    inputs = jax.tree.map(lambda leaf: leaf[None], inputs)
    selection = programs.select(compressor, 0.25, tiny.GRID)(inputs)
    ids = programs.answer(params, batch, selection)
    whole = programs.vanilla(params, batch, want_attention=True)
    return programs.compiled, (ids, *whole)

  made, together = answers()
  assert "decode" not in made and together[0].shape == (1, NEW)
  given = {"prefill": {"xla_gpu_enable_triton_gemm": False}}
  monkeypatch.setattr(
    mesh_lib, "compiler_options", lambda kind, _=None, **__: given.get(kind, {})
  )
  made, apart = answers()
  # Of two lengths of cache.
  assert made["decode"] == 2 and made["answer"] == made["vanilla"] == 1
  for one, other in zip(together[:2], apart[:2], strict=True):
    np.testing.assert_array_equal(one, other)  # Tokens.
  np.testing.assert_allclose(together[2], apart[2], rtol=1e-5)
