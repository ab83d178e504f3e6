"""Heads without nonlinearity (the paper, appendix B)."""

import jax
from flax import nnx

from mtp_jax import config
from mtp_jax.model import layers


class Linear(nnx.Module):
  """A head that is one matrix, without nonlinearity."""

  def __init__(self, cfg: config.Model, key: jax.Array):
    D = cfg.width
    self.w = layers.param(key, (D, D), ("embed", None), D)

  def __call__(self, x: jax.Array, ctx: layers.Context) -> jax.Array:
    """[B, T, D] -> [B, T, D]; reads nothing of `ctx`."""
    # E: the width D of the result.
    return layers.product("BTD,DE->BTE", x, self.w)
