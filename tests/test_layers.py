"""Layers against plain numpy, written from the formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.model import layers
from tests import parameters

# H/K = 3 query heads share a kv head; D = H C.
B, T, S, D, F, H, K, C = 5, 11, 13, 60, 37, 6, 2, 10
CFG = config.Model(
  vocab=53,
  width=D,
  mlp=F,
  layers=7,
  attn_heads=H,
  kv_heads=K,
  rope_theta=97.0,
  norm_eps=1e-3,
)
# float32 rounds to 6e-8; the sums here have up to 60 terms of size about 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def wide(x):
  return np.asarray(x, np.float64)


def np_norm(x, scale):
  rms = np.sqrt(np.mean(wide(x) ** 2, -1, keepdims=True) + CFG.norm_eps)
  return wide(x) / rms * wide(scale)


def np_rotate(x, positions):
  """Neighbouring channels as one complex number, turned by t theta^(-2j/C)."""
  x = wide(x)
  z = x[..., 0::2] + 1j * x[..., 1::2]
  speed = CFG.rope_theta ** (-2.0 * np.arange(C // 2) / C)
  turn = np.exp(1j * wide(positions)[..., None, None] * speed)
  out = np.empty_like(x)
  out[..., 0::2], out[..., 1::2] = (z * turn).real, (z * turn).imag
  return out


def np_attention(q, k, v, mask):
  """One batch row, one head, one position at a time; mask [B, T, S]."""
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(q.shape[:3]):
    kv = h // (H // K)
    scores = wide(k[b, :, kv]) @ wide(q[b, t, h]) / np.sqrt(C)
    weights = np.where(mask[b, t], np.exp(scores - scores.max()), 0.0)
    out[b, t, h] = weights / weights.sum() @ wide(v[b, :, kv])
  return out


def np_block(block, x, k, v, positions, mask):
  """Pre-norm attention over k, v, then SwiGLU, each with its residual."""
  w = {name: wide(getattr(block, name)[...]) for name in WEIGHTS}
  x = wide(x)
  q = np.einsum("btd,dhc->bthc", np_norm(x, w["attn_norm"]), w["wq"])
  attended = np_attention(np_rotate(q, positions), k, v, mask)
  x = x + attended.reshape(*x.shape[:2], -1) @ w["wo"].reshape(-1, D)
  y = np_norm(x, w["mlp_norm"])
  gate = y @ w["w_gate"]
  gate = gate / (1 + np.exp(-gate))
  return x + (gate * (y @ w["w_up"])) @ w["w_down"]


def np_keys_values(block, x, positions):
  y = np_norm(x, block.attn_norm[...])
  k = np.einsum("btd,dkc->btkc", y, wide(block.wk[...]))
  v = np.einsum("btd,dkc->btkc", y, wide(block.wv[...]))
  return np_rotate(k, positions), v


WEIGHTS = (
  "attn_norm",
  "wq",
  "wk",
  "wv",
  "wo",
  "mlp_norm",
  "w_gate",
  "w_up",
  "w_down",
)


@pytest.fixture(scope="module")
def block():
  """A block of which no parameter is special: norm scales are not 1, and
  what is added to the residual is as large as the residual."""
  return parameters.filled(lambda key: layers.Block(CFG, key), 0.15)


@pytest.fixture(scope="module")
def segments():
  """Rows with documents of different lengths, and padding (0) at the end."""
  ends = np.random.default_rng(0).integers(2, T, (B, 2))
  numbers = 1 + (np.arange(T) >= ends.min(1, keepdims=True)).astype(np.int32)
  numbers[-1, -3:] = 0
  return jnp.asarray(numbers)


def test_rms_norm():
  x, scale = 3 * parameters.normal(1, B, T, D), parameters.normal(2, D)
  norm = jax.jit(layers.rms_norm)
  got = norm(x, scale, CFG.norm_eps)
  np.testing.assert_allclose(got, np_norm(x, scale), **CLOSE)
  tiny = norm(x * 1e-3, scale, CFG.norm_eps)  # eps shows here
  np.testing.assert_allclose(tiny, np_norm(x * 1e-3, scale), **CLOSE)


def test_rms_norm_works_in_float32():
  """Rounded once, at the end: a mean of squares in bfloat16 shows."""
  x = jnp.asarray(parameters.normal(1, T, D), jnp.bfloat16)
  got = layers.rms_norm(x, jnp.ones(D), 1e-6)
  assert got.dtype == jnp.bfloat16
  rms = np.sqrt(np.mean(wide(x) ** 2, -1, keepdims=True) + 1e-6)
  # bfloat16 keeps 8 binary digits: one rounding is at most 2^-8.
  np.testing.assert_allclose(wide(got), wide(x) / rms, rtol=2**-8)


def test_rotate():
  x = parameters.normal(3, B, T, H, C)
  positions = jnp.asarray(np.random.default_rng(4).integers(0, 1000, (B, T)))
  ctx = layers.context(positions, None, CFG)
  # Angles up to 1000 carry 1000 x 6e-8 of rounding.
  rotate = jax.jit(layers.rotate)
  np.testing.assert_allclose(rotate(x, ctx), np_rotate(x, positions), atol=5e-4)
  at_zero = layers.context(jnp.zeros((B, T), jnp.int32), None, CFG)
  np.testing.assert_array_equal(rotate(x, at_zero), x)


def test_rotation_knows_distances_only():
  """Scores of q at m and k at s depend on m - s, and do depend on it."""
  q, k = parameters.normal(5, 1, T, H, C), parameters.normal(6, 1, T, H, C)

  @jax.jit
  def scores(shift_q, shift_k):
    def turned(x, shift):
      ctx = layers.context(jnp.arange(T)[None] + shift, None, CFG)
      return layers.rotate(x, ctx)

    return jnp.einsum("BTHC,BSHC->BHTS", turned(q, shift_q), turned(k, shift_k))

  # The angles' rounding, 131 x 6e-8, times scores of about 10.
  np.testing.assert_allclose(scores(131, 131), scores(0, 0), atol=2e-4)
  assert jnp.abs(scores(1, 0) - scores(0, 0)).max() > 1


def test_project_kv(block):
  x, positions = parameters.normal(7, B, T, D), jnp.arange(T) + 3
  positions = jnp.broadcast_to(positions, (B, T))
  ctx = layers.context(positions, None, CFG)
  got_kv = jax.jit(lambda f, x: f.project_kv(x, ctx))(block, x)
  for got, want in zip(
    got_kv, np_keys_values(block, x, positions), strict=True
  ):
    assert got.shape == (B, T, K, C)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_mix(block):
  """T queries over S keys under any mask, positions of their own per row."""
  x, k, v = (
    parameters.normal(8, B, T, D),
    parameters.normal(9, B, S, K, C),
    parameters.normal(10, B, S, K, C),
  )
  positions = jnp.arange(T) + 2 * jnp.arange(B)[:, None]
  mask = jnp.asarray(np.random.default_rng(11).random((B, T, S)) < 0.6)
  mask = mask.at[:, :, 0].set(True)  # no row without any key
  attend = jax.tree_util.Partial(
    jax.nn.dot_product_attention, mask=mask[:, None]
  )
  ctx = layers.context(positions, attend, CFG)
  got = jax.jit(lambda f: f.mix(x, ctx, k, v))(block)
  want = np_block(block, x, k, v, positions, np.asarray(mask))
  np.testing.assert_allclose(got, want, **CLOSE)
  assert np.abs(want - x).std() > 0.3  # the layer adds what can be seen


@pytest.mark.parametrize("mask_documents", [True, False])
def test_block(block, segments, mask_documents):
  cfg = dataclasses.replace(CFG, mask_documents=mask_documents)
  x = parameters.normal(12, B, T, D)
  positions = np.broadcast_to(np.arange(T), (B, T))
  mask = np.zeros((B, T, T), bool)
  for b, t, s in np.ndindex(mask.shape):
    same = segments[b, t] == segments[b, s]
    mask[b, t, s] = s <= t and (same or not mask_documents)
  k, v = np_keys_values(block, x, positions)
  got = jax.jit(lambda f, x: f(x, layers.training_context(segments, cfg)))(
    block, x
  )
  want = np_block(block, x, k, v, positions, mask)
  np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_what_a_position_sees(block, segments, mask_documents):
  """The output at t moves with the input at s just if t may look at s."""
  cfg = dataclasses.replace(CFG, mask_documents=mask_documents)
  row = segments[:1]
  ctx = layers.training_context(row, cfg)

  @jax.jit
  def influence(x):
    pull = jax.vjp(lambda x: block(x[None], ctx)[0], x)[1]
    each = jnp.eye(T)[:, :, None] * parameters.normal(
      17, T, 1, D
    )  # one t at a time
    return jnp.abs(jax.vmap(pull)(each)[0]).max(-1)

  seen = (
    influence(parameters.normal(13, T, D)) > 0
  )  # exactly 0 outside the mask
  t, s = np.indices((T, T))
  same = np.asarray(row[0])[t] == np.asarray(row[0])[s]
  np.testing.assert_array_equal(seen, (s <= t) & (same | (not mask_documents)))
  assert (~same & (s <= t)).any()  # there are two documents to tell apart


def test_training_context_counts_on_across_documents(segments):
  """Positions are those of the window: attention sees distances only."""
  ctx = layers.training_context(segments, CFG)
  want = layers.context(jnp.arange(T)[None], None, CFG)
  np.testing.assert_array_equal(ctx.cos[0], want.cos[0])
  np.testing.assert_array_equal(ctx.sin[-1], want.sin[0])


def test_birth():
  """Deviation 1 / sqrt(fan in), and the layers' depth in what is added."""
  cfg = dataclasses.replace(
    CFG, width=240, mlp=211, layers=13, extra_layers=2, norm_eps=1e-5
  )
  made = jax.jit(lambda key: layers.Block(cfg, key))(jax.random.key(1))
  added = (2 * 15) ** -0.5
  for name in WEIGHTS:
    value = getattr(made, name)[...]
    assert value.dtype == jnp.float32
    if name.endswith("norm"):
      np.testing.assert_array_equal(value, np.ones(240))
      continue
    want = (211 if name == "w_down" else 240) ** -0.5
    want *= added if name in ("wo", "w_down") else 1
    # 19,200 or more samples: the deviation is known to 0.5 %, times four.
    assert abs(value.std() / want - 1) < 0.02, name
    assert abs(value.mean()) < 0.03 * want, name


def test_stack_is_its_layers():
  key = jax.random.key(2)
  make = jax.jit(lambda k: layers.Block(CFG, k))
  stacked = layers.stack(make, key, 3)
  for i, k in enumerate(jax.random.split(key, 3)):
    alone = make(k)
    for name in WEIGHTS:
      param = getattr(stacked, name)
      assert param.axes == getattr(alone, name).axes
      # vmap and a lone call may round the last bit differently.
      np.testing.assert_allclose(param[i], getattr(alone, name)[...], rtol=1e-6)


def gradients(block, x, ctx, policy):
  call = layers.rematerialise(lambda f, x: f(x, ctx), policy)
  return jax.jit(
    jax.value_and_grad(lambda f, x: jnp.sin(call(f, x)).sum(), (0, 1))
  )(block, x)


def test_rematerialise_changes_no_number(block, segments):
  x, ctx = (
    parameters.normal(14, B, T, D),
    layers.training_context(segments, CFG),
  )
  want = gradients(block, x, ctx, "none")
  for policy in ("dots", "full"):
    got = gradients(block, x, ctx, policy)
    jax.tree.map(
      # The compiler fuses the second run differently: last bits only.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
      got,
      want,
    )


def test_rematerialise_keeps_what_it_says(block, segments):
  """Sizes of what waits for the backward pass; parameters always do."""
  x, ctx = (
    parameters.normal(15, B, T, D),
    layers.training_context(segments, CFG),
  )

  def kept(policy):
    call = layers.rematerialise(lambda f, x: f(x, ctx), policy)
    pull = jax.jit(lambda f, x: jax.vjp(call, f, x)[1])(block, x)
    return sum(a.size for a in jax.tree.leaves(pull))

  inputs = sum(a.size for a in jax.tree.leaves((block, x, ctx)))
  products = B * T * (D + 2 * K * C + D + 2 * F)  # q, k, v, wo, gate, up
  assert kept("full") <= inputs
  assert abs(kept("dots") - kept("full") - products) <= B * T * D
  assert kept("none") > kept("dots") + B * T * H * T


def test_barriers_outside_of_scans():
  """The second run must not be merged with the first."""

  def text(policy, **options):
    call = layers.rematerialise(
      lambda x: jnp.sin(jnp.sin(x)), policy, **options
    )
    return jax.jit(jax.grad(call)).lower(1.0).as_text()

  assert "optimization_barrier" in text("full")
  assert "optimization_barrier" in text("dots")
  assert "optimization_barrier" not in text("full", scanned=True)
  assert "optimization_barrier" not in text("none")


def test_bfloat16_activations(block, segments):
  """Parameters and their gradients stay float32."""
  ctx = layers.training_context(segments, CFG)
  x = jnp.asarray(parameters.normal(16, B, T, D), jnp.bfloat16)

  def total(f, x):
    y = f(x, ctx)
    assert y.dtype == jnp.bfloat16
    return y.astype(jnp.float32).sum()

  grads, dx = jax.jit(jax.grad(total, (0, 1)))(block, x)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  assert dx.dtype == jnp.bfloat16
  run = jax.jit(lambda f, x: f(x, ctx).astype(jnp.float32))
  got, want = run(block, x), run(block, x.astype(jnp.float32))
  # A dozen roundings of 2^-9 each, on values of up to about 6.
  np.testing.assert_allclose(got, want, atol=0.1)
  assert (got != want).any()
