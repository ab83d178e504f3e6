"""The whole model: scan against loop, counts, metadata, plain JAX on it."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import nnx

from mtp_jax import config
from mtp_jax.model import heads, layers, model
from tests import parameters

B, T, D, F, H, K, V, N = 5, 11, 12, 17, 6, 2, 23, 3
CFG = config.Model(
  vocab=V,
  width=D,
  mlp=F,
  layers=7,
  attn_heads=H,
  kv_heads=K,
  n_future=N,
)


def filled(**changes):
  """A model with parameters of which none is special."""
  cfg = dataclasses.replace(CFG, **changes)
  return parameters.model_of(cfg, 0.25)


@pytest.fixture(scope="module")
def net():
  return filled()


@pytest.fixture(scope="module")
def tokens():
  return jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


@pytest.fixture(scope="module")
def segments():
  return jnp.asarray([[1] * 4 + [2] * 5 + [0] * 2] * B, jnp.int32)


def test_look_up(net, tokens):
  want = np.asarray(net.embed[...])[np.asarray(tokens)]
  np.testing.assert_array_equal(net.look_up(tokens), want)
  narrow = filled(dtype="bfloat16").look_up(tokens)
  np.testing.assert_array_equal(narrow, jnp.asarray(want, jnp.bfloat16))


@pytest.mark.parametrize("remat", config.REMAT_POLICIES)
def test_trunk_is_its_layers_in_order(remat, tokens, segments):
  made = filled(remat=remat)
  ctx = layers.training_context(segments, CFG)
  got = jax.jit(lambda net: net.run_trunk(tokens, ctx))(made)
  one = jax.jit(lambda block, x: block(x, ctx))
  x = made.embed[...][tokens]
  for i in range(4):
    x = one(jax.tree.map(lambda a, i=i: a[i], made.trunk), x)
  assert made.trunk.wq.shape == (4, D, H, D // H)
  # Last bits of four layers on values of up to about 10.
  np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)


def test_call(net, tokens, segments):
  """Trunk, heads and unembedding; None is one document."""
  run = jax.jit(lambda net, s: net(tokens, s))
  logits = run(net, segments)
  assert (logits.shape, logits.dtype) == ((N, B, T, V), jnp.float32)
  ctx = layers.training_context(segments, CFG)
  want = jax.jit(
    lambda net: net.heads.logits(
      net.heads(heads.Inputs(net.run_trunk(tokens, ctx), ctx))
    )
  )(net)
  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
  alone = jax.jit(lambda net: net(tokens))(net)
  np.testing.assert_allclose(
    alone, run(net, jnp.ones_like(segments)), rtol=1e-5, atol=1e-5
  )
  assert (np.abs(alone - logits).max((0, 1, 3)) > 1e-3).tolist() == (
    [False] * 4 + [True] * 7
  )


@pytest.mark.parametrize("head", config.HEAD_KINDS)
def test_no_head_looks_ahead(head, tokens):
  """A token changed at s moves no output before s, and every head's at s."""
  made = filled(head=head)
  run = jax.jit(lambda net, tokens: net(tokens))
  s = 6
  other = tokens.at[:, s].set((tokens[:, s] + 1) % V)
  change = np.abs(run(made, other) - run(made, tokens)).max((1, 3))  # [N, T]
  np.testing.assert_array_equal(change[:, :s], 0)
  assert (change[:, s] > 1e-2).all()


def test_dtypes(tokens):
  """Under bfloat16 only activations are: parameters, logits and gradients
  stay float32."""
  made = filled(dtype="bfloat16", layers=3, n_future=2)
  ctx = layers.training_context(jnp.ones_like(tokens), CFG)
  z = jax.eval_shape(lambda net: net.run_trunk(tokens, ctx), made)
  assert z.dtype == jnp.bfloat16

  def loss(net):
    logits = net(tokens)
    assert logits.dtype == jnp.float32
    return jax.nn.logsumexp(logits, -1).mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(made)
  assert value.dtype == jnp.float32
  assert {a.dtype for a in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  want = jax.jit(loss)(filled(layers=3, n_future=2))
  # A mean over 2 x 5 x 11 positions of values off by about 2^-8 of 3.
  np.testing.assert_allclose(value, want, rtol=5e-3)


PER_LAYER = 2 * D + D * D * (2 + 2 * K / H) + 3 * D * F  # norms, q o k v, mlp


@pytest.mark.parametrize(
  ("changes", "blocks", "unembeddings", "rest"),
  [
    ({}, 7, 1, 0),
    ({"n_future": 1}, 7, 1, 0),
    ({"head": "causal"}, 7, 1, 0),
    ({"head": "anticausal", "n_future": 5}, 7, 1, 0),
    ({"head": "linear"}, 7, 1, N * D * D),
    ({"head": "unembedding"}, 7, N, 0),
    ({"extra_layers": 2}, 9, 1, 0),
  ],
)
def test_count_parameters(changes, blocks, unembeddings, rest):
  count = model.count_parameters(dataclasses.replace(CFG, **changes))
  assert count["layers"] == blocks * PER_LAYER + rest + D  # D: the last norm
  assert count["total"] - count["layers"] == (1 + unembeddings) * V * D


def test_bad_shapes_are_refused():
  cfg = dataclasses.replace(CFG, layers=3)
  with pytest.raises(ValueError, match=r"layers 3 leaves 0 trunk layers"):
    model.Model(cfg, jax.random.key(0))


SHAPES = {
  "attn_norm": (D,),
  "wq": (D, H, D // H),
  "wk": (D, K, D // H),
  "wv": (D, K, D // H),
  "wo": (H, D // H, D),
  "mlp_norm": (D,),
  "w_gate": (D, F),
  "w_up": (D, F),
  "w_down": (F, D),
}
AXES = {
  "attn_norm": (None,),
  "wq": ("embed", "attn_heads", None),
  "wk": ("embed", "kv_heads", None),
  "wv": ("embed", "kv_heads", None),
  "wo": ("attn_heads", None, "embed"),
  "mlp_norm": (None,),
  "w_gate": ("embed", "mlp"),
  "w_up": ("embed", "mlp"),
  "w_down": ("mlp", "embed"),
}


@pytest.mark.parametrize("head", config.HEAD_KINDS)
def test_names_shapes_and_axes(head):
  """Every parameter: its name, its shape, its logical axes from birth."""
  cfg = dataclasses.replace(CFG, head=head)
  net = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
  stacks = {"trunk": cfg.trunk_layers}
  want = {"embed": ((V, D), ("vocab", "embed")), "heads/norm": ((D,), (None,))}
  own = head == "unembedding"
  unembed = ((N,) if own else ()) + (D, V)
  want["heads/unembed"] = (unembed, ("embed", "vocab"))
  if head == "linear":
    want["heads/layers/w"] = ((N, D, D), ("embed", None))
  elif not own:
    stacks["heads/layers"] = N
  for stack, size in stacks.items():
    for name in SHAPES:
      want[f"{stack}/{name}"] = ((size, *SHAPES[name]), AXES[name])
  leaves = jax.tree_util.tree_leaves_with_path(
    net, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  assert all(type(p) is nnx.Param for _, p in leaves)
  assert {
    jax.tree_util.keystr(path, simple=True, separator="/"): (p.shape, p.axes)
    for path, p in leaves
  } == want


def test_axes_stay_through_plain_jax(net, tokens):
  """Gradients and Adam moments are models, with the metadata of theirs."""
  grads = jax.eval_shape(jax.grad(lambda net: net(tokens).sum()), net)
  adam = jax.eval_shape(optax.adam(1e-3).init, net)[0]

  def axes(tree):
    is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return [p.axes for p in jax.tree.leaves(tree, is_leaf=is_leaf)]

  assert len(axes(net)) == 21
  for tree in (grads, adam.mu, adam.nu):
    assert type(tree) is model.Model
    assert tree.cfg == CFG
    assert axes(tree) == axes(net)


def test_an_equal_config_does_not_compile_again(tokens):
  """The config is part of the tree's structure, by value."""
  traces = []

  @jax.jit
  def run(net):
    traces.append(0)
    return net.look_up(tokens)

  run(filled())
  run(filled())
  assert len(traces) == 1
  run(filled(norm_eps=1e-4))
  assert len(traces) == 2


TRAIN = """
import jax, jax.numpy as jnp, optax
from flax import configurations
from mtp_jax import config, loss
from mtp_jax.data import batch
from mtp_jax.model import model

assert configurations.config.nnx_graph_mode is False
assert configurations.config.nnx_graph_updates is False
for head in ("causal", "unembedding"):
  cfg = config.Model(vocab=23, width=12, mlp=17, layers=5, attn_heads=3,
                     kv_heads=1, n_future=3, head=head, remat="full")
  tx = optax.adamw(1e-2)

  @jax.jit
  def start(key):
    net = model.Model(cfg, key)
    return net, tx.init(net)

  net, opt = start(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (5, 14), 0, 23)
  windows = batch.of(tokens)
  targets = loss.future_targets(windows, 3)

  @jax.jit
  def step(net, opt):
    def total(net):
      return loss.token_loss(net, windows, targets, jnp.full((3,), 1 / 165))[0]
    value, grads = jax.value_and_grad(total)(net)
    updates, opt = tx.update(grads, opt, net)
    return optax.apply_updates(net, updates), opt, value

  values = []
  for _ in range(8):
    net, opt, value = step(net, opt)
    values.append(float(value))
  # It starts near the uniform log 23 and learns its five sequences.
  assert abs(values[0] - jnp.log(23)) < 1, values
  assert values[-1] < values[0] - 0.3, values
  assert type(net) is type(opt[0].mu) is model.Model
print("trained")
"""


@pytest.mark.slow
def test_trains_without_nnx_graphs():
  """Plain jit, grad and optax on the module, with every NNX machinery off."""
  off = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
  done = subprocess.run(  # flax reads them when it is imported
    [sys.executable, "-c", TRAIN],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | off,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert (done.returncode, done.stdout) == (0, "trained\n")
