"""Kinds of heads that read tokens; the library has none yet, so tests do.

sequential  a chain as DeepSeek-V3's (arXiv 2412.19437, section 2.2): head i
            joins the state of head i-1 with the embedding of token t+i-1
reading     the same layer, but each head reads the trunk's output
"""

import contextlib

import jax
import pytest

from mtp_jax import config
from mtp_jax.model import heads, layers


class Joining(layers.Block):
  """A transformer layer over a state and an embedding, normed and joined."""

  def __init__(self, cfg: config.Model, key: jax.Array):
    k_block, k_state, k_token = jax.random.split(key, 3)
    super().__init__(cfg, k_block)
    D = cfg.width
    self.state_norm, self.token_norm = layers.ones(D), layers.ones(D)
    self.w_state = layers.param(k_state, (D, D), ("embed", None), 2 * D)
    self.w_token = layers.param(k_token, (D, D), ("embed", None), 2 * D)

  def join(self, x: jax.Array, e: jax.Array) -> jax.Array:
    """A state and an embedding, each [B, T, D] -> [B, T, D]."""
    x = layers.rms_norm(x, self.state_norm[...], self.cfg.norm_eps)
    e = layers.rms_norm(e, self.token_norm[...], self.cfg.norm_eps)
    state = layers.product("BTD,DE->BTE", x, self.w_state)
    return state + layers.product("BTD,DE->BTE", e, self.w_token)


KINDS = {
  "sequential": heads.Kind(Joining, feeds=1, reads_tokens=True),
  "reading": heads.Kind(Joining, reads_tokens=True),
}


@contextlib.contextmanager
def registered():
  """Within it a config may name the kinds above."""
  with pytest.MonkeyPatch.context() as patch:
    for name, kind in KINDS.items():
      patch.setitem(heads.KINDS, name, kind)
      patch.setitem(config.HEAD_KINDS, name, 1)
    yield
