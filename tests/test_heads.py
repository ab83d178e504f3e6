"""Heads against loops that say what each kind computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.model import heads, layers
from tests import parameters

B, T, D, F, H, K, V, N = 5, 7, 12, 17, 3, 1, 19, 3
CFG = config.Model(
  vocab=V,
  width=D,
  mlp=F,
  layers=5,
  attn_heads=H,
  kv_heads=K,
  n_future=N,
  norm_eps=1e-3,
)
# float32 rounds to 6e-8; a chain of three layers on values of about 10.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def filled(kind, **changes):
  """Heads of a kind with parameters of which none is special."""
  cfg = dataclasses.replace(CFG, head=kind, **changes)
  return parameters.filled(lambda key: heads.Heads(cfg, key), 0.3)


@functools.cache
def born(kind):
  cfg = dataclasses.replace(CFG, head=kind)
  return jax.jit(lambda key: heads.Heads(cfg, key))(jax.random.key(0))


def np_norm(x, scale):
  x = np.asarray(x, np.float64)
  rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + CFG.norm_eps)
  return x / rms * np.asarray(scale)


@pytest.fixture(scope="module")
def z():
  return parameters.normal(1, B, T, D)


@pytest.fixture(scope="module")
def ctx():
  segments = jnp.asarray([[1] * 4 + [2] * 3] * B, jnp.int32)
  return layers.training_context(segments, CFG)


def by_hand(made, z, ctx):
  """(hidden, logits) of every head, one head and one kind at a time."""
  kind = made.cfg.head

  run = jax.jit(lambda f, x: f(x, ctx))

  def layer(i, x):  # head i+1 alone, cut from the stack
    if kind == "linear":
      return np.asarray(x, np.float64) @ np.asarray(made.layers.w[i])
    one = jax.tree.map(lambda a: a[i], made.layers)
    return run(one, jnp.asarray(x, jnp.float32))

  if kind in ("parallel", "linear"):
    states = [layer(i, z) for i in range(N)]
  elif kind == "causal":  # f_i ... f_2 f_1 z
    states = []
    for i in range(N):
      x = z
      for j in range(i + 1):
        x = layer(j, x)
      states.append(x)
  elif kind == "anticausal":  # f_i f_{i+1} ... f_N z
    states = []
    for i in range(N):
      x = z
      for j in range(N - 1, i - 1, -1):
        x = layer(j, x)
      states.append(x)
  else:
    states = [z] * N
  hidden = [np_norm(x, made.norm[...]) for x in states]
  unembed = np.asarray(made.unembed[...])
  own = kind == "unembedding"
  logits = [h @ (unembed[i] if own else unembed) for i, h in enumerate(hidden)]
  return np.stack(hidden), np.stack(logits)


@pytest.mark.parametrize("kind", config.HEAD_KINDS)
def test_kinds(kind, z, ctx):
  made = filled(kind)

  @jax.jit
  def both(made, z):
    hidden = made(heads.Inputs(z, ctx))
    return hidden, made.logits(hidden)

  hidden, logits = both(made, z)
  want_hidden, want_logits = by_hand(made, z, ctx)
  assert hidden.shape == (N, B, T, D)
  assert logits.shape == (N, B, T, V)
  np.testing.assert_allclose(hidden, want_hidden, **CLOSE)
  np.testing.assert_allclose(logits, want_logits, **CLOSE)
  # Every two heads differ, or an order could not show.
  assert min(abs(logits[i] - logits[i - 1]).max() for i in range(N)) > 0.1


def test_the_choices_of_the_config_are_the_table():
  """A transformer layer per head counts among a model's layers."""
  assert config.HEAD_KINDS == {
    name: int(kind.layer is not None and issubclass(kind.layer, layers.Block))
    for name, kind in heads.KINDS.items()
  }


def test_first_is_head_1_and_a_copy_leaves_the_original(z, ctx):
  for kind in config.HEAD_KINDS:
    made, inputs = filled(kind), heads.Inputs(z, ctx)
    first = jax.jit(lambda made, inputs=inputs: made.first(inputs))(made)
    np.testing.assert_allclose(first, made(inputs)[0], **CLOSE)
  before = made.norm
  other = made.replace(norm=None)
  assert other.norm is None and made.norm is before
  with pytest.raises(ValueError, match="Heads has no attribute 'norms'"):
    made.replace(norms=None)


def test_order():
  """Which head feeds the next; None where heads are independent."""
  order = {kind: filled(kind).order for kind in config.HEAD_KINDS}
  assert order == {
    "parallel": None,
    "linear": None,
    "causal": [0, 1, 2],
    "anticausal": [2, 1, 0],
    "unembedding": None,
  }


@pytest.mark.parametrize(
  ("kind", "moved"),
  [
    ("parallel", [[0], [1], [2]]),
    ("linear", [[0], [1], [2]]),
    ("causal", [[0, 1, 2], [1, 2], [2]]),
    ("anticausal", [[0], [0, 1], [0, 1, 2]]),
  ],
)
def test_whom_a_layer_moves(kind, moved, z, ctx):
  """Row i: the heads whose output changes with layer i."""
  made = filled(kind)
  run = jax.jit(lambda made: made(heads.Inputs(z, ctx)))
  before = run(made)
  for i in range(N):
    other = made.replace(
      layers=jax.tree.map(lambda a, i=i: a.at[i].multiply(1.5), made.layers)
    )
    change = np.abs(run(other) - before).max((1, 2, 3))
    assert np.flatnonzero(change > 1e-3).tolist() == moved[i]


def test_one_head_is_the_last_layer_of_an_ordinary_model(z, ctx):
  """With N = 1 the three transformer kinds are the same thing."""
  outs = [
    jax.jit(lambda f: f(heads.Inputs(z, ctx)))(filled(kind, n_future=1))
    for kind in ("parallel", "causal", "anticausal")
  ]
  for out in outs[1:]:
    # vmap over one head compiles to other matrix products: last bits.
    np.testing.assert_allclose(out, outs[0], **CLOSE)


@pytest.mark.parametrize("kind", config.HEAD_KINDS)
def test_birth(kind):
  """Leading N on what each head owns, and no two heads born alike."""
  made = born(kind)
  assert made.norm.shape == (D,)  # one norm for all
  own = made.unembed if kind == "unembedding" else made.layers
  assert made.unembed.shape == ((N,) if kind == "unembedding" else ()) + (D, V)
  assert (made.layers is None) == (kind == "unembedding")
  block = ("attn_norm", "mlp_norm", "w_down", "w_gate", "w_up")
  block += ("wk", "wo", "wq", "wv")
  names = {"linear": {"w"}, "unembedding": {""}}.get(kind, set(block))
  leaves = jax.tree_util.tree_leaves_with_path(own)
  assert {str(p[0].name) if len(p) > 1 else "" for p, _ in leaves} == names
  for path, leaf in leaves:
    assert leaf.shape[0] == N
    if "norm" in jax.tree_util.keystr(path):
      np.testing.assert_array_equal(leaf, jnp.ones((N, D)))
      continue
    assert len(np.unique(leaf)) > 0.98 * leaf.size  # no head, no row repeats
    for i in range(N):
      # Independent normals: at least 144 samples, correlations within 0.25
      # but for one in a thousand.
      x, y = np.ravel(leaf[i]), np.ravel(leaf[i - 1])
      assert abs(np.corrcoef(x, y)[0, 1]) < 0.3


def test_linear_and_unembedding_scales():
  assert abs(born("linear").layers.w.std() * D**0.5 - 1) < 0.15  # 432 samples
  assert abs(born("causal").unembed.std() * D**0.5 - 1) < 0.2  # 228 samples


def test_logits_are_float32(z, ctx):
  """bfloat16 states meet bfloat16 copies; sums and logits are float32."""
  for kind in ("parallel", "linear", "unembedding"):
    made = filled(kind, dtype="bfloat16")

    @jax.jit
    def run(made, z):
      hidden = made(heads.Inputs(z, ctx))
      return hidden, made.logits(hidden)

    hidden, logits = run(made, z.astype(jnp.bfloat16))
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert made.unembed.dtype == jnp.float32
    # A sum of products of bfloat16s, in float32: more digits than bfloat16.
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
    want = by_hand(filled(kind), z, ctx)[1]
    # Ten roundings of 2^-8 on logits that reach about 5.
    np.testing.assert_allclose(logits, want, atol=0.15)


@pytest.mark.parametrize("kind", ["parallel", "anticausal"])
def test_remat_changes_no_number(kind, z, ctx):
  def gradient(remat):
    made = filled(kind, remat=remat)
    total = jax.value_and_grad(lambda f: jnp.sin(f(heads.Inputs(z, ctx))).sum())
    return jax.tree.leaves(jax.jit(total)(made))

  want = gradient("none")
  for a, b in zip(gradient("full"), want, strict=True):
    # Fused differently: last bits of gradients of up to about 30.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
