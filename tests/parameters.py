"""Parameters of which none is special, and quickly made."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


def filled(make, gain):
  """`make(key)` with norms about 1 and the rest about `gain`, by name."""
  made = jax.eval_shape(make, jax.random.key(0))

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    values = normal(sum(map(ord, name)), *leaf.shape)
    return 1 + 0.3 * values if "norm" in name else gain * values

  return jax.tree_util.tree_map_with_path(fill, made)
