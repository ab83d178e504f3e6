"""Training under a frozen trunk: `train.freeze`, `loss.frozen_loss`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import flops
from mtp_jax import loss
from mtp_jax.data import batch as batch_lib
from mtp_jax.model import cost, surgery
from mtp_jax.train import step as step_lib
from tests import parameters, sequential_heads
from tests.test_train import B, N, T, bits, make_batch, mesh, settings

# A chain that reads tokens has all that the other kinds have, except these.
KINDS = ("parallel", "unembedding", "sequential")


@pytest.fixture(scope="module", autouse=True)
def kinds():
  with sequential_heads.registered():
    yield


def distance(a, b):
  """Norm of the difference of two trees over the norm of the second."""
  a, b = (
    np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])
    for tree in (a, b)
  )
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_formulas_of_heads_2_to_n(kind):
  net = parameters.random_model(kind, vocab=29)
  batch = make_batch()
  targets = loss.future_targets(batch, N)
  scale = jnp.array([0.7, 0.5, 0.3]) / targets.weight_sums()[0]

  @jax.jit
  def both(net, z):
    own = surgery.trainable(net)

    def whole(own):
      joined = surgery.join(net, own)
      how = loss.Settings(implementation="formula")
      return loss.token_loss(joined, batch, targets, scale, how)

    def frozen(own):
      data = dataclasses.replace(batch, z=z)
      how = loss.Settings(block=4)
      return loss.frozen_loss(own, net, data, targets, scale, how)

    gradient = functools.partial(jax.value_and_grad, has_aux=True)
    return gradient(whole)(own), gradient(frozen)(own)

  # On outputs of the trunk that were kept; below they train as the trunk does.
  want, found = both(net, net.read(batch.tokens, batch.segments).z)
  assert distance(found, want) < 1e-6


@functools.cache
def compiled(freeze):
  """Settings, and the compiled step."""
  cfg = settings(optim__decay=0.3, model__vocab=1511, train__freeze=freeze)
  state = step_lib.abstract_state(cfg, mesh())
  rows = batch_lib.abstract(B, T + N)
  return cfg, step_lib.compile_step(cfg, mesh()).lower(state, rows).compile()


def test_20_steps_move_heads_2_to_n_alone():
  cfg, step = compiled("trunk")
  state = step_lib.init_state(cfg, mesh())
  before = jax.tree.map(jnp.copy, state.model)
  for i in range(20):
    state, found = step(state, make_batch(i))
  first, last = (surgery.drop_heads(x, 1) for x in (before, state.model))
  assert bits(first) == bits(last)
  old, new = (surgery.trainable(x) for x in (before, state.model))
  for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
    assert all((x != y).any() for x, y in zip(a, b, strict=True))
  size = sum(a.size for a in jax.tree.leaves(new))
  assert sum(a.size for a in jax.tree.leaves(state.opt)) < 2 * size + 10
  # What is reported is the loss of all heads, head 1's of the first model.
  batch = make_batch(19)
  targets = loss.future_targets(batch, N)
  _, nll = jax.jit(loss.token_loss)(before, batch, targets, jnp.ones(N))
  nats, weights = found["nats"], targets.weight_sums()
  np.testing.assert_allclose(nats[0], nll[0] / weights[0], rtol=1e-5)
  assert (nats[1:] < nll[1:] / weights[1:]).all()
  np.testing.assert_allclose(found["loss"], nats @ weights / weights[0], 1e-5)


def test_memory_and_flops():
  state = step_lib.abstract_state(compiled("none")[0], mesh())
  own = jax.eval_shape(surgery.trainable, state.model)
  fixed = sum(a.size for a in jax.tree.leaves(state.model))
  fixed -= sum(a.size for a in jax.tree.leaves(own))
  none, trunk = (
    compiled(freeze)[1].memory_analysis() for freeze in ("none", "trunk")
  )
  saved = none.argument_size_in_bytes - trunk.argument_size_in_bytes
  assert saved == 2 * 4 * fixed  # Adam's moments, float32
  saved = none.temp_size_in_bytes - trunk.temp_size_in_bytes
  # Two gradients at least, of the embedding and of the unembedding.
  assert saved > 2 * 4 * state.model.embed.size
  # Of FLOPs, exactly the products that are needed. The count by formula leaves
  # out the masked half of attention, and counts the norms as matrices.
  T = 12  # three blocks of positions, without padding
  for freeze, layers in (("none", 3 * (1 + N)), ("trunk", 1 + N + 2 * (N - 1))):
    cfg, _ = compiled(freeze)
    count = flops.count(
      functools.partial(step_lib.train_step, cfg=cfg, mesh=mesh()),
      step_lib.abstract_state(cfg, mesh()),
      batch_lib.abstract(B, T + N),
    )
    want = cost.flops_per_token(cfg.model, T, freeze)
    want += 2 * T * cfg.model.width * layers
    assert count == pytest.approx(B * T * want, rel=2e-3)


def test_kept_outputs_of_the_trunk_train_as_it_does():
  cfg, step = compiled("trunk")
  state, batch = step_lib.init_state(cfg, mesh()), make_batch()
  z = jax.jit(lambda net: net.read(batch.tokens, batch.segments).z)(state.model)
  kept = dataclasses.replace(batch, z=z)
  in_parts = cfg.replace(train={"accumulate": 2})
  given = jax.tree.map(jnp.copy, state)
  found, _ = step_lib.compile_step(in_parts, mesh())(given, kept)
  with pytest.raises(ValueError, match="the trunk would learn nothing"):
    step_lib.train_step(state, kept, cfg=settings(), mesh=mesh())
  want, _ = step(state, batch)
  moments = (x.opt[1][0].mu for x in (found, want))
  assert distance(*moments) < 1e-5  # Adam's first moment is the gradient
