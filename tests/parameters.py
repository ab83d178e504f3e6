"""Random models, none of whose parameters is special, and quickly made.

`random_model` builds a small one, `model_of` that of a config, `filled` any
other module. NumPy draws the values and scales them, so nothing is compiled.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import config
from mtp_jax.model import model


def normal(seed, *shape):
  return jnp.asarray(_normal(seed, shape))


def _normal(seed, shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(make, gain, seed=0):
  """`make(key)` with norms about 1 and the rest about `gain`, by name."""
  return _filled(jax.eval_shape(make, jax.random.key(0)), gain, seed)


def _filled(shapes, gain, seed):
  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    values = _normal([seed, zlib.crc32(name.encode())], leaf.shape)
    return jnp.asarray(1 + 0.3 * values if "norm" in name else gain * values)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def model_config(kind="parallel", **fields) -> config.Model:
  """A small model; by default 2 trunk layers, and those that its heads have."""
  sizes = {"vocab": 31, "width": 24, "mlp": 41, "attn_heads": 6, "kv_heads": 2}
  cfg = config.Model(**({"head": kind, "n_future": 3} | sizes | fields))
  if "layers" in fields:
    return cfg
  return dataclasses.replace(cfg, layers=2 + cfg.head_layers)


def random_model(kind="parallel", *, seed=0, deviation=0.2, **fields):
  """A `model_config`'s model."""
  return model_of(model_config(kind, **fields), deviation, seed)


def model_of(cfg: config.Model, deviation=0.2, seed=0) -> model.Model:
  return _filled(_shapes(cfg), deviation, seed)


@functools.cache
def _shapes(cfg):
  return jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))
