"""Attention kernels under `mesh.model` > 1: mapped by hand, numbers of one.

Of accelerators' kernels, stand-ins run here and the real ones are lowered.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec as P

from cacovid_jax.models import attention
from cacovid_jax.parallel import mesh as mesh_lib
from tests.parallel import kernels
from tests.training import tiny

MESHES = [(4, 1), (1, 4), (2, 2)]  # data, model


@pytest.fixture
def kernel(monkeypatch):
  return kernels.stand_in(monkeypatch)


def _gradients(attend, q, k, v, lengths, mask):
  """Returns (attention, its gradients) of a batch."""

  def total(q, k, v):
    out = attend(q, k, v, causal=True, lengths=lengths, mask=mask)
    seen = jnp.arange(out.shape[1]) < lengths[:, None]
    return jnp.sin(jnp.where(seen[..., None, None], out, 0)).sum(), out

  found = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
  return found[1], found[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("data", "model"), MESHES)
def test_heads_are_computed_by_hand(kernel, data, model, masked):
  # Two kv heads do not divide among four devices, nor six heads.
  for heads, own in ((4, (4 // model, max(2 // model, 1))), (6, None)):
    rng = np.random.default_rng(heads)
    q, k, v = (
      rng.standard_normal((4, 6, count, 8)).astype(np.float32)
      for count in (heads, 2, 2)
    )
    lengths = np.array([3, 6, 1, 5], np.int32)
    mask = np.tril(rng.random((4, 6, 6)) < 0.7) | np.eye(6, dtype=bool)
    given = q, k, v, lengths, mask if masked else None
    expected = _gradients(
      functools.partial(attention.attention, backend="xla"), *given
    )
    mesh = mesh_lib.make_mesh(data, model)
    # As policies are mapped over their prompts.
    one = functools.partial(_gradients, attention.attention)
    mapped = mesh_lib.map_over_data(
      lambda *rows, one=one: jax.tree.map(
        lambda leaf: leaf[:, 0],
        jax.vmap(one)(*jax.tree.map(lambda leaf: leaf[:, None], rows)),
      ),
      mesh,
      (P("data"),) * 5,
      P("data"),
    )
    found = jax.jit(mapped)(*given)
    assert set(kernel) == {own or ((3, 1) if model == 2 else (6, 2))}
    kernel.clear()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("platform", "backend", "calls"),
  [("tpu", "splash", "tpu_custom_call"), ("cuda", "cudnn", "cudnn$fmha")],
)
def test_kernels_lower_for_accelerators(monkeypatch, platform, backend, calls):
  check = "check_cudnn_version", "check_compute_capability"
  for name in check:
    monkeypatch.setattr(
      fused_attention_stablehlo, name, lambda *_: 91000, raising=True
    )

  def gradient(q, k, v, lengths):
    options = dict(causal=True, lengths=lengths, backend=backend)
    return jax.grad(
      lambda q: attention.attention(q, k, v, **options).sum(dtype=jnp.float32)
    )(q)

  q, k = (
    jax.ShapeDtypeStruct((4, 128, heads, 64), jnp.bfloat16) for heads in (4, 2)
  )
  lengths = jax.ShapeDtypeStruct((4,), jnp.int32)

  def lowered():
    mapped = mesh_lib.map_over_data(
      gradient, mesh_lib.make_mesh(2, 2), (P("data"),) * 4, P("data")
    )
    traced = jax.jit(mapped).trace(q, k, k, lengths)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  text = lowered()
  assert calls in text and "CustomSPMDPartitioning" not in text
  # Left to the compiler, one kernel is refused and one asks to be split.
  monkeypatch.setattr(
    attention, "_by_heads",
    lambda kernel, causal, q, k, v, *seen: kernel(q, k, v, causal, *seen),
  )  # fmt: skip
  if platform == "tpu":
    with pytest.raises(NotImplementedError, match="automatically partitioned"):
      lowered()
  else:
    assert "CustomSPMDPartitioning" in lowered()


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_training_with_kernels_is_that_of_one_device(kernel, data, model):
  config = tiny.step_config(reward="margin", learning_rate=1e-3)
  batches = [tiny.batch(4, seed=7)]
  _, one, outs_one = tiny.run(config, batches)
  kernel.clear()
  _, many, outs_many = tiny.run(config, batches, data=data, model=model)
  assert kernel or model == 1
  (ids, rewards, metrics), (ids_many, rewards_many, metrics_many) = (
    outs_one[0], outs_many[0],
  )  # fmt: skip
  np.testing.assert_array_equal(ids, ids_many)
  # What the two trained policies keep of other videos.
  other = tiny.batch(4, seed=8)
  masks = tiny.kept(config, one, other)
  leaves = jax.tree.leaves(masks)
  assert leaves and all(len({x.tobytes() for x in leaf}) > 1 for leaf in leaves)
  jax.tree.map(
    np.testing.assert_array_equal,
    tiny.kept(config, many, other, data=data, model=model),
    masks,
  )
  np.testing.assert_allclose(rewards, rewards_many, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    metrics.mean["loss"], metrics_many.mean["loss"], rtol=1e-4, atol=1e-6
  )
  for a, b in zip(
    *(jax.tree.leaves(jax.device_get(s.params)) for s in (one, many)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
