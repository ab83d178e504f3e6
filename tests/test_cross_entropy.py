"""The fused cross-entropy against log_softmax of all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import flops
from mtp_jax.loss import cross_entropy

B, T, D, V = 2, 13, 7, 83
BLOCKS = [1, 5, 256]  # 5 does not divide T


def naive(hidden, unembed, targets):
  """In float64, all logits at once."""
  targets, weight = targets
  logits = np.float64(hidden) @ np.float64(unembed)
  logits -= logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  there = (np.asarray(targets) >= 0) * np.float64(weight)
  picked = np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)
  nll = -(picked[..., 0] * there).sum()
  d_logits = (np.exp(log_p) - np.eye(V)[targets]) * there[..., None]
  d_hidden = d_logits @ np.float64(unembed).T
  return nll, d_hidden, np.einsum("btd,btv->dv", np.float64(hidden), d_logits)


@functools.cache
def case(dtype="float32"):
  keys = jax.random.split(jax.random.key(0), 5)
  hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
  unembed = jax.random.normal(keys[1], (D, V))
  targets = jax.random.randint(keys[2], (B, T), 0, V)
  ignored = jax.random.bernoulli(keys[3], 0.3, (B, T))
  # 0, 1 and fractions; weights of ignored targets are not 0.
  weight = jnp.clip(2 * jax.random.uniform(keys[4], (B, T)) - 0.5, 0, 1)
  return hidden, unembed, weighted(jnp.where(ignored, -1, targets), weight)


def weighted(tokens, weight=None):
  weight = jnp.ones(tokens.shape) if weight is None else weight
  return cross_entropy.Targets(tokens, weight)


def distance(a, b):
  """Norm of the difference over the norm of b."""
  a, b = np.float64(a), np.float64(b)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("block", BLOCKS)
def test_value_and_gradients(block):
  hidden, unembed, targets = case()
  wanted = naive(hidden, unembed, targets)
  fused = functools.partial(cross_entropy.cross_entropy, block=block)
  found = jax.value_and_grad(fused, (0, 1))(hidden, unembed, targets)
  # 26 x 83 float32 terms: 1e-6 is about ten roundings
  assert fused(hidden, unembed, targets) == pytest.approx(wanted[0], rel=1e-6)
  assert found[0] == pytest.approx(wanted[0], rel=1e-6)
  assert distance(found[1][0], wanted[1]) < 1e-6
  assert distance(found[1][1], wanted[2]) < 1e-6


def test_token_nll_is_log_softmax():
  hidden, unembed, targets = case()
  logits = cross_entropy.project(hidden, unembed)
  nll = cross_entropy.token_nll(logits, targets.tokens)
  assert nll.shape == (B, T)
  assert nll.sum() == pytest.approx(
    naive(hidden, unembed, weighted(targets.tokens))[0], rel=1e-6
  )
  assert np.array_equal(np.asarray(nll) == 0, np.asarray(targets.tokens) < 0)


def test_cotangent_multiplies():
  hidden, unembed, targets = case()
  loss = functools.partial(cross_entropy.cross_entropy, block=5)
  one = jax.grad(loss, (0, 1))(hidden, unembed, targets)
  three = jax.grad(lambda *a: 3 * loss(*a), (0, 1))(hidden, unembed, targets)
  for a, b in zip(one, three, strict=True):
    np.testing.assert_allclose(3 * a, b, rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 2])
def test_value_and_grads_adds_slice_by_slice(shards):
  hidden, unembed, targets = case()
  start = jax.random.normal(jax.random.key(5), (shards, D, V))
  nll, d_hidden, d_unembed = cross_entropy.value_and_grads(
    hidden, unembed, targets, jnp.float32(0.37), start, 5
  )
  wanted = naive(hidden, unembed, targets)
  assert nll == pytest.approx(wanted[0], rel=1e-6)  # the scale is not in it
  assert distance(d_hidden, 0.37 * wanted[1]) < 1e-6
  for r in range(shards):
    rows = slice(r * B // shards, (r + 1) * B // shards)
    part = jax.tree.map(lambda a, rows=rows: a[rows], targets)
    own = naive(hidden[rows], unembed, part)[2]
    # the start, of norm 1 per entry, is added and taken away: cancellation
    assert distance(d_unembed[r] - start[r], 0.37 * own) < 3e-6


def test_bfloat16_hidden_keeps_float32_sums():
  hidden, unembed, targets = case("bfloat16")
  rounded = unembed.astype("bfloat16")  # as the products see it
  wanted = naive(hidden, rounded, targets)
  nll, (d_hidden, d_unembed) = jax.value_and_grad(
    functools.partial(cross_entropy.cross_entropy, block=5), (0, 1)
  )(hidden, unembed, targets)
  assert nll.dtype == d_unembed.dtype == jnp.float32
  assert d_hidden.dtype == jnp.bfloat16
  assert nll == pytest.approx(wanted[0], rel=1e-6)
  # d(logits) and d(hidden) are rounded to 8 bits once each: 2**-9 apiece
  assert distance(d_hidden, wanted[1]) < 4e-3
  assert distance(d_unembed, wanted[2]) < 2e-3


def test_sums_of_many_blocks_do_not_lose_bits():
  """In bfloat16 a sum of 512 equal terms stops growing at 256 of them."""
  hidden = jnp.ones((1, 512, 1), "bfloat16")
  targets = weighted(jnp.zeros((1, 512), jnp.int32))
  nll, d_unembed = jax.value_and_grad(
    lambda u: cross_entropy.cross_entropy(hidden, u, targets, 1)
  )(jnp.zeros((1, 2)))
  assert nll == pytest.approx(512 * np.log(2), rel=1e-5)
  np.testing.assert_array_equal(d_unembed, [[-256, 256]])


def test_large_logits_stay_finite():
  hidden, unembed, targets = case()
  nll, grads = jax.value_and_grad(
    functools.partial(cross_entropy.cross_entropy, block=5), (0, 1)
  )(1e4 * hidden, unembed, targets)
  assert nll == pytest.approx(
    naive(1e4 * hidden, unembed, targets)[0], rel=1e-6
  )
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("token, weight", [(-1, 1), (3, 0)])
def test_nothing_to_predict_is_zero(token, weight):
  hidden, unembed, _ = case()
  nothing = weighted(jnp.full((B, T), token), jnp.full((B, T), float(weight)))
  nll, grads = jax.value_and_grad(
    functools.partial(cross_entropy.cross_entropy, block=5), (0, 1)
  )(hidden, unembed, nothing)
  assert nll == 0 and not any(g.any() for g in grads)


def test_one_position():
  hidden, unembed, targets = case()
  at = np.s_[:, :1]
  targets = jax.tree.map(lambda a: a[at], targets)
  nll = cross_entropy.cross_entropy(hidden[at], unembed, targets, 256)
  wanted = naive(hidden[at], unembed, targets)[0]
  assert nll == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_little_is_padded(block):
  """A block longer than a divisor of T must not double the work."""
  one = 2 * D * V * B
  forward = flops.count(
    lambda *a: cross_entropy.cross_entropy(*a, block), *case()
  )
  assert forward % one == 0 and T <= forward // one <= T + 2


def test_undifferentiated_is_one_product():
  hidden, unembed, targets = case()
  loss = functools.partial(
    cross_entropy.cross_entropy, targets=targets, block=13
  )
  one = flops.count(loss, hidden, unembed)
  both = flops.count(jax.value_and_grad(loss, (0, 1)), hidden, unembed)
  assert both == 3 * one


def test_block_of_nothing_is_an_error():
  with pytest.raises(ValueError, match="block 0 "):
    cross_entropy.cross_entropy(*case(), 0)


def test_memory_is_a_block_not_a_window():
  B, T, D, V = 2, 64, 16, 4001

  def temp(block):
    shapes = ((B, T, D), "float32"), ((D, V), "float32"), ((B, T), "int32")
    hidden, unembed, tokens = (jax.ShapeDtypeStruct(*s) for s in shapes)
    step = jax.jit(
      jax.value_and_grad(
        lambda h, u, t: cross_entropy.cross_entropy(h, u, t, block), (0, 1)
      )
    ).lower(hidden, unembed, weighted(tokens))
    return step.compile().memory_analysis().temp_size_in_bytes

  logits = 4 * B * T * V
  # a block's logits and their gradient, d(unembed), 256 KiB of small things
  assert temp(4) < 3 * logits * 4 / T + 2 * 4 * D * V + 2**18
  assert temp(4) < 0.5 * logits < temp(64)
