"""A small training state and its checkpoints, for the tests of checkpoint/."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtp_jax.checkpoint import checkpoints, fallback

# Reads that orbax abandons when a file is damaged complain when collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)


META = {
  "config": {"model": {"width": 64, "head": "causal"}, "train": {"steps": 9}},
  "tokenizer": "bytes-1",
  "data": "3f",
}


class Net(nnx.Module):
  def __init__(self, key):
    self.w = nnx.Param(jax.random.normal(key, (61, 67)), axes=("embed", "mlp"))
    self.b = nnx.Param(jax.random.normal(key, (7,), jnp.bfloat16), axes=(None,))


def make_state(seed):
  net, tx = Net(jax.random.key(seed)), optax.adamw(1e-3)
  gradient = Net(jax.random.key(seed + 100))
  return {
    "model": net,
    "opt": tx.update(gradient, tx.init(net), net)[1],
    "key": jax.random.key(seed + 1),
    "flags": jax.random.bernoulli(jax.random.key(seed), 0.5, (11,)),
    "step": jnp.int32(seed),
  }


def raw(tree):
  """Every leaf as (dtype, bytes), so that NaN and -0 count too."""
  leaves = [
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
    for x in jax.tree.leaves(tree)
  ]
  return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


@pytest.fixture
def warnings(monkeypatch):
  """What the module itself warns of; orbax writes to the same logger."""
  lines = []

  def warning(text, *values):
    line = text % values if values else text
    if "damaged" in line:
      lines.append(line)

  monkeypatch.setattr(fallback.logging, "warning", warning)
  return lines


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two") / "steps"
  with checkpoints.Checkpoints(folder) as saved:
    for step in (1, 2):
      saved.save(step, make_state(step), META)
  return folder


@pytest.fixture
def folder(two_steps, tmp_path):
  return shutil.copytree(two_steps, tmp_path / "steps")


@functools.cache
def shapes():
  return jax.eval_shape(make_state, 0)


@functools.cache
def wanted(step):
  return raw(make_state(step))


def restored(folder):
  """The step that a new process would go on from; its values are right."""
  with checkpoints.Checkpoints(folder) as saved:
    state, _, step = saved.restore(shapes())
  assert raw(state) == wanted(step)
  return step


def files_of(folder, step):
  return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file())


def flip_weights(folder, step):
  """Flips a bit of the weights of one step and of nothing else."""
  largest = max(
    (f for f in files_of(folder, step) if f.parent.name == "d"),
    key=lambda f: f.stat().st_size,
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 16
  largest.write_bytes(data)
