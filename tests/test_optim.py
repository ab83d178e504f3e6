"""Optimiser against plain numpy: schedule, mask, clipping, AdamW."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtp_jax import config
from mtp_jax.model import model
from mtp_jax.train import optim
from tests import parameters

STEPS = 101


def np_schedule(cfg, step, steps):
  """Linear from 0, then a line or half a cosine from peak to end x peak."""
  if step < cfg.warmup:
    return cfg.peak * step / cfg.warmup
  share = min(1.0, (step - cfg.warmup) / (steps - cfg.warmup))
  left = 1 - share
  if cfg.schedule == "cosine":
    left = (1 + math.cos(math.pi * share)) / 2
  return cfg.peak * (cfg.end + (1 - cfg.end) * left)


@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("end", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule(kind, warmup, end):
  cfg = config.Optim(peak=0.7, schedule=kind, warmup=warmup, end=end)
  got = jax.vmap(optim.schedule(cfg, STEPS))(jnp.arange(STEPS + 20))
  want = [np_schedule(cfg, step, STEPS) for step in range(STEPS + 20)]
  # float32's cosine near its zero slope.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(got[0], 0.0 if warmup else 0.7, rtol=1e-6)
  np.testing.assert_allclose(got[warmup], 0.7, rtol=1e-6)
  np.testing.assert_allclose(got[STEPS:], 0.7 * end, rtol=1e-5, atol=1e-7)


class Net(nnx.Module):
  """A matrix, a stack of norm scales (two axes, one logical), a stack."""

  def __init__(self, seed, size=1.0):
    rng = np.random.default_rng(seed)

    def draw(shape, axes):
      value = jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
      return nnx.Param(value, axes=axes)

    self.w = draw((5, 7), ("embed", "mlp"))
    self.scale = draw((3, 5), (None,))
    self.stack = draw((3, 7, 2), ("mlp", "embed"))


def arrays(net):
  return {
    name: np.asarray(getattr(net, name)[...], np.float64)
    for name in ("w", "scale", "stack")
  }


def np_adamw(cfg, params, gradients, steps):
  """The parameters after each gradient, one formula per line."""
  m = {k: np.zeros_like(p) for k, p in params.items()}
  v = {k: np.zeros_like(p) for k, p in params.items()}
  for i, g in enumerate(gradients):
    norm = np.sqrt(sum((a**2).sum() for a in g.values()))
    rate = np_schedule(cfg, i, steps)
    params = dict(params)
    for k in params:
      a = g[k] * min(1.0, cfg.clip / norm)
      m[k] = cfg.beta1 * m[k] + (1 - cfg.beta1) * a
      v[k] = cfg.beta2 * v[k] + (1 - cfg.beta2) * a**2
      m_hat = m[k] / (1 - cfg.beta1 ** (i + 1))
      v_hat = v[k] / (1 - cfg.beta2 ** (i + 1))
      decay = 0.0 if k == "scale" else cfg.decay
      step = m_hat / (np.sqrt(v_hat) + 1e-8) + decay * params[k]
      params[k] = params[k] - rate * step
    yield params


@pytest.mark.parametrize("clip", [0.31, 1e9])
def test_adamw(clip):
  """Three steps; gradients whose norms lie far above and below the clip."""
  cfg = config.Optim(
    peak=0.3, warmup=0, end=0.1, beta1=0.8, beta2=0.9, decay=0.4, clip=clip
  )
  net, steps = Net(0), 5
  gradients = [Net(1, 3.0), Net(2, 0.01), Net(3, 1.0)]
  tx = optim.make(cfg, steps)
  state = tx.init(net)

  @jax.jit
  def update(net, state, gradient):
    updates, state = tx.update(gradient, state, net)
    return optax.apply_updates(net, updates), state

  want = np_adamw(cfg, arrays(net), map(arrays, gradients), steps)
  for gradient, expected in zip(gradients, want, strict=True):
    net, state = update(net, state, gradient)
    assert type(net) is Net and net.scale.axes == (None,)
    for name, value in arrays(net).items():
      # A quotient of float32s, 6e-8 each, times steps of size 1.
      np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_clip():
  """Scaled as one vector to the norm, and left alone below it."""
  cfg = config.Optim(peak=1.0, warmup=0, beta1=0.0, decay=0.0, clip=0.5)
  tx = optim.make(cfg, STEPS)
  net = Net(0)
  for size, norm in ((3.0, 0.5), (1e-3, None)):
    gradient = Net(1, size)
    _, state = tx.update(gradient, tx.init(net), net)
    mu = optax.tree_utils.tree_get(state, "mu")  # beta1 = 0: what went in
    if norm is None:
      norm = optax.tree.norm(gradient)
      assert norm < 0.5
    np.testing.assert_allclose(optax.tree.norm(mu), norm, rtol=1e-5)
    ratio = np.ravel(mu.w[...] / gradient.w[...])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_warmup_begins_at_zero():
  """The first update moves nothing, the second does."""
  tx = optim.make(config.Optim(warmup=2, peak=0.1), STEPS)
  net = Net(0)
  state = tx.init(net)
  first, state = tx.update(Net(1), state, net)
  second, _ = tx.update(Net(1), state, net)
  assert not any(np.any(a) for a in jax.tree.leaves(first))
  assert all(np.all(a) for a in jax.tree.leaves(second))


def test_muon_takes_the_iterations_that_it_is_told():
  """Three leave other updates than five, equal to optax's own three."""
  net, gradient = Net(0), Net(1)

  def update(tx):
    return tx.update(gradient, tx.init(net), net)[0].w[...]

  cfg = dict(kind="muon", peak=0.3, warmup=0, decay=0.0, clip=1e9)
  three = update(optim.make(config.Optim(**cfg, newton_schulz=3), STEPS))
  five = update(optim.make(config.Optim(**cfg), STEPS))
  plain = optax.contrib.muon(0.3, ns_steps=3, consistent_rms=0.2)
  w = net.w[...]
  want, _ = plain.update(gradient.w[...], plain.init(w), w)
  np.testing.assert_allclose(three, want, rtol=1e-3, atol=1e-5)
  assert not np.allclose(three, five, rtol=1e-2)


@pytest.mark.parametrize("head", config.HEAD_KINDS)
def test_norms_and_biases_alone_do_not_decay(head):
  more = {"qkv_bias": True, "qk_norm": True} if head == "causal" else {}
  cfg = parameters.model_config(head, **more)
  net = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
  mask = optim.decayed(net)
  assert jax.tree.structure(mask) == jax.tree.structure(net)
  by_name = {
    jax.tree_util.keystr(path, simple=True, separator="/"): keep
    for path, keep in jax.tree_util.tree_leaves_with_path(mask)
  }
  spared = {name.removesuffix("/value") for name, k in by_name.items() if not k}
  want = {"trunk/attn_norm", "trunk/mlp_norm", "heads/norm"}
  if head in ("parallel", "causal", "anticausal"):
    want |= {"heads/layers/attn_norm", "heads/layers/mlp_norm"}
  if more:
    names = "bq", "bk", "bv", "q_norm", "k_norm"
    want |= {
      f"{stack}/{n}" for stack in ("trunk", "heads/layers") for n in names
    }
  assert spared == want
  assert len(by_name) > len(want)


def test_muon_takes_each_layer_as_a_matrix_and_leaves_the_ends_to_adam():
  """Equals optax's Muon on one layer's two-dimensional matrices; embedding,
  unembedding, norms and biases move as under Adam without decay."""
  cfg = parameters.model_config(
    "linear", vocab=23, width=12, mlp=17, n_future=2, qkv_bias=True
  )
  optimiser = config.Optim(
    kind="muon", peak=0.3, adam_ratio=2.0, warmup=0, decay=0.4, clip=1e9
  )
  net, gradient = (parameters.model_of(cfg, seed=i) for i in range(2))

  rate = optim.schedule(optimiser, STEPS)

  def updates(tx):
    return jax.jit(tx.update)(gradient, tx.init(net), net)[0]

  got = updates(optim.make(optimiser, STEPS))
  ends = updates(optax.nadam(lambda t: 2 * rate(t), b1=0.9, b2=0.95))
  vectors = "heads/norm", "trunk/mlp_norm", "trunk/bq", "trunk/bk"
  for name in ("embed", "heads/unembed", *vectors):
    a, b = (attribute(tree, name) for tree in (got, ends))
    np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)

  D = cfg.width
  shapes = {"wq": (D, -1), "wk": (D, -1), "wv": (D, -1), "wo": (-1, D)}
  shapes |= {"w_gate": (D, -1), "w_up": (D, -1), "w_down": (-1, D)}
  plain = optax.contrib.muon(rate, weight_decay=0.4, consistent_rms=0.2)
  matrices = {f"trunk/{name}": shape for name, shape in shapes.items()}
  matrices["heads/layers/w"] = (D, D)
  for name, shape in matrices.items():
    for layer in range(2):
      p, g, u = (
        attribute(tree, name)[layer].reshape(shape)
        for tree in (net, gradient, got)
      )
      want, _ = plain.update(g, plain.init(p), p)
      # Products of float32 in another order, through five iterations.
      np.testing.assert_allclose(u, want, rtol=2e-3, atol=2e-4, err_msg=name)


def attribute(tree, path):
  for name in path.split("/"):
    tree = getattr(tree, name)
  return tree[...]
