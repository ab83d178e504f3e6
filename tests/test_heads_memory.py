"""The rivals compute what they claim, and a missed bound is called missed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engineering.heads_memory import rivals, run, scales
from mtp_jax import loss
from mtp_jax.model import heads, layers
from tests import parameters

SCALE = scales.Scale(
  width=28,
  mlp=31,
  layers=5,
  attn_heads=2,
  batch=2,
  seq_len=11,
  block=4,
  rounds=1,
  vocab=83,
)
N = 3


@pytest.fixture(scope="module")
def arguments():
  """heads, inputs, targets and scale of the losses."""
  net = parameters.model_of(run.settings(SCALE, N))
  keys = jax.random.split(jax.random.key(1), 2)
  z = jax.random.normal(keys[0], (2, 11, 28))
  ctx = layers.training_context(jnp.ones((2, 11), jnp.int32), net.cfg)
  targets = jax.random.randint(keys[1], (N, 2, 11), -1, 83)
  targets = loss.Targets(targets, jnp.ones(targets.shape))
  inputs = heads.Inputs(z, ctx)
  return net.heads, inputs, targets, jnp.asarray([0.7, 0.2, 0.05])


def test_optax_rival_is_the_formula(arguments):
  found = rivals.optax_checkpointed(*arguments, key=None)
  wanted = loss.formula(*arguments)[0]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_one_random_head_is_the_formula_on_average(arguments):
  draw = jax.jit(lambda key: rivals.one_random_head(*arguments, key))
  drawn = np.asarray(
    [draw(key) for key in jax.random.split(jax.random.key(2), 30)]
  )
  values = np.unique(drawn.round(3))
  assert len(values) == N  # each head comes up, and nothing else
  np.testing.assert_allclose(
    values.mean(), loss.formula(*arguments)[0], rtol=1e-4
  )


def rows(memory, work):
  return [
    {
      "implementation": name,
      "n": n,
      "temp_mib": memory[name] * n**power,
      "gflop": work[name] * n,
    }
    for name, power in (("serial", 0), ("formula", 1))
    for n in run.HEADS
  ]


def test_verdicts_tell_met_from_missed():
  def met(memory, work, grown):
    found = run.verdicts(SCALE, rows(memory, work), grown, steps=[])
    return [bound.met for bound in found.values()]

  flat = dict.fromkeys(run.HEADS, 10.0)
  even = {"serial": 1.0, "formula": 1.0}
  assert all(met({"serial": 10, "formula": 20}, even, flat))
  steep = {n: 10.0 * n for n in run.HEADS}
  assert not any(
    met({"serial": 10, "formula": 10}, even | {"serial": 1.03}, steep)[1:]
  )


def test_steps_are_compared_turn_by_turn():
  steps = [
    {"n": n, "seconds": t, "processor_seconds": 2 * t, "gflop": 10.0 * n}
    for turn in ((1, 3), (10, 30), (2, 6))
    for n, t in zip((1, 4), turn, strict=True)
  ]
  found = run.verdicts(
    SCALE,
    rows({"serial": 1, "formula": 1}, {"serial": 1, "formula": 1}),
    dict.fromkeys(run.HEADS, 1.0),
    steps,
  )
  figures = {name: bound.figure for name, bound in found.items()}
  assert figures["step seconds, n=4 over n=1, as it is"] == 3
  adjusted = "step processor_seconds, n=4 over n=1, added FLOPs taken out"
  assert figures[adjusted] == pytest.approx(0.75)
  assert found[adjusted].met
