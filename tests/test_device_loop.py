"""Many training steps per call equal the steps one by one."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.paper import base
from experiments.measure import device_loop
from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints
from mtp_jax.data import batch as batch_lib
from mtp_jax.evaluate import choices
from mtp_jax.train import step as step_lib
from tests import parameters

CFG = config.Config().replace(
  model=dict(
    vocab=31,
    width=16,
    mlp=24,
    layers=1,
    attn_heads=2,
    kv_heads=2,
    n_future=2,
    head="unembedding",
  ),
  data=dict(batch=3, seq_len=7),
  optim=dict(warmup=1, peak=1e-2),
  train=dict(steps=4, seed=5),
)


def rows(call):
  random = np.random.default_rng(call)
  tokens = random.integers(0, 31, (6, 9))
  weight = random.choice([0.0, 0.3, 1.0], tokens.shape)
  segments = np.sort(random.integers(1, 3, tokens.shape), 1)
  return batch_lib.Batch(tokens, segments, weight)


@pytest.fixture(scope="module")
def trained():
  found = []
  for progress in device_loop.train(CFG, rows, steps_per_call=2):
    net = jax.tree.map(np.asarray, progress.net)
    found.append(progress._replace(net=net))
  return found


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(config.Mesh(data=1), jax.local_devices()[:1])


@pytest.fixture(scope="module")
def initial(mesh):
  return step_lib.init_state(CFG, mesh)


def test_calls_equal_single_steps(trained, initial, mesh):
  step = step_lib.compile_step(CFG, mesh)
  state = jax.tree.map(jnp.copy, initial)  # the step takes its buffers
  nats = []
  for call in range(2):
    for i in range(2):
      part = jax.tree.map(lambda a, i=i: a[3 * i : 3 * i + 3], rows(call))
      part = batch_lib.Batch(
        part.tokens.astype(np.int32),
        part.segments.astype(np.int32),
        part.weight.astype(np.float32),
      )
      state, metrics = step(state, part)
      nats.append(np.asarray(metrics["nats"]))
  assert [p.step for p in trained] == [2, 4]
  assert [p.tokens for p in trained] == [0, 2 * 3 * 7]
  for i, p in enumerate(trained):
    # One program fuses otherwise than the other: rounding.
    np.testing.assert_allclose(
      p.nats, np.mean(nats[2 * i : 2 * i + 2], 0), rtol=1e-5
    )
  ours, theirs = jax.tree.leaves(trained[-1].net), jax.tree.leaves(state.model)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_seeds_share_a_program():
  other = CFG.replace(train={"seed": 6})
  assert device_loop.compiled(CFG, 2) is device_loop.compiled(other, 2)


def test_evaluations_are_compiled_on_models_that_begin(initial):
  found = []
  (thread,) = device_loop.evaluate_ahead([CFG], found.append)
  thread.join()
  ours, theirs = found[0], initial.model
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_it_refuses():
  with pytest.raises(ValueError, match="4 are not whole calls of 3 steps"):
    next(device_loop.train(CFG, rows, steps_per_call=3))

  def short(call):
    return jax.tree.map(lambda a: a[:, :-1], rows(call))

  with pytest.raises(ValueError, match=r"rows \(6, 8\).*asks for \(6, 9\)"):
    next(device_loop.train(CFG, short, steps_per_call=2))

  def infinite(call):
    found = rows(call)
    return batch_lib.Batch(
      found.tokens, found.segments, np.full_like(found.weight, np.inf)
    )

  with pytest.raises(FloatingPointError, match="not finite by step 2"):
    next(device_loop.train(CFG, infinite, steps_per_call=2))


@pytest.mark.parametrize("head", ["unembedding", "causal"])
def test_first_choices_are_those_of_the_logits(head):
  net = parameters.random_model(head, vocab=31, n_future=3)
  random = np.random.default_rng(0)
  tokens = random.integers(0, 31, (2, 8)).astype(np.int32)
  places = random.integers(0, 8, (2, 5))
  found = choices.first_choices(net, tokens, places)
  logits = np.asarray(jax.jit(lambda net, x: net(x)[0])(net, tokens))
  expected = np.take_along_axis(logits.argmax(-1), places, 1)
  np.testing.assert_array_equal(found, expected)


def test_a_training_goes_on_from_its_checkpoint(trained, tmp_path, monkeypatch):
  """Killed after its first checkpoint, it ends with the same bits."""
  assert device_loop.saved_step(tmp_path) == -1
  monkeypatch.setattr(device_loop, "SAVE_S", 0)
  stopped = device_loop.train(CFG, rows, steps_per_call=2, folder=tmp_path)
  assert [next(stopped).step, next(stopped).step] == [2, 4]
  stopped.close()
  assert device_loop.saved_step(tmp_path) == 2
  for cfg, K, name in (
    (CFG.replace(optim={"peak": 1e-3}), 2, "config.optim.peak: 0.01 in the"),
    (CFG, 1, "steps_per_call: 2 in the first, 1 in the second"),
  ):
    other = device_loop.train(cfg, rows, steps_per_call=K, folder=tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=name):
      next(other)
  other = device_loop.train(
    CFG, rows, steps_per_call=2, folder=tmp_path, depends_on={"pauses": 5}
  )
  with pytest.raises(checkpoints.CheckpointError, match="pauses: None in the"):
    next(other)
  shutil.copytree(tmp_path, damaged := tmp_path / "damaged")
  for file in (damaged / "checkpoints/2").rglob("d/*"):
    file.write_bytes(bytes(file.stat().st_size))
  other = device_loop.train(CFG, rows, steps_per_call=2, folder=damaged)
  with pytest.raises(
    checkpoints.CheckpointError, match=r"checkpoint 2.*Or remove"
  ):
    next(other)
  (rest,) = device_loop.train(CFG, rows, steps_per_call=2, folder=tmp_path)
  assert (rest.step, rest.tokens) == (4, 0)
  np.testing.assert_array_equal(rest.nats, trained[-1].nats)
  for ours, theirs in zip(
    jax.tree.leaves(rest.net), jax.tree.leaves(trained[-1].net), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_a_short_training_saves_nothing(tmp_path):
  for _ in device_loop.train(CFG, rows, steps_per_call=2, folder=tmp_path):
    pass
  assert device_loop.saved_step(tmp_path) == -1


def test_a_row_in_each_microbatch_trains_the_same(trained):
  """As the paper's runs do on one device."""
  cfg = base.one_row_per_chip(CFG, 1)
  assert cfg.train.accumulate == 3
  for ours, theirs in zip(
    device_loop.train(cfg, rows, steps_per_call=2), trained, strict=True
  ):
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5)
