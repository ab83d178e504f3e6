"""Kinds of heads that read tokens; the library has none yet, so tests do.

sequential  a chain as DeepSeek-V3's (arXiv 2412.19437, section 2.2): head i
            joins the state of head i-1 with the embedding of token t+i-1. Head
            1 joins, too; there it is the main model
reading     the same layer, but each head reads the trunk's output
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mtp_jax import config
from mtp_jax.decode import window as window_lib
from mtp_jax.model import heads, layers, model


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
  """An `interface.Decoder` of heads that read tokens, for chains of drafts.

  Its cache is the text, and each call computes the model anew: it shows what
  such heads ask of a decoding loop, not how to be fast.
  """

  net: model.Model
  row_step = 1

  @property
  def vocab(self):
    return self.net.cfg.vocab

  @property
  def n_future(self):
    return self.net.cfg.n_future

  def empty_cache(self, batch, cache_len, heads):
    return (jnp.zeros((batch, cache_len), jnp.int32),)

  def capacity(self, cache):
    return cache[0].shape[1]

  def grow(self, cache, cache_len):
    return (jnp.pad(cache[0], ((0, 0), (0, cache_len - cache[0].shape[1]))),)

  def forward(self, cache, tokens, start, *, tree=None, valid=None):
    text = put(cache[0], tokens, start)
    trunk = jnp.zeros((*tokens.shape, 1))
    return window_lib.Window((text,), start, trunk, tree=tree)

  def keep_path(self, window, node):
    # Of a chain, whose accepted drafts lie where they belong.
    return dataclasses.replace(window, start=window.start + node, tree=None)

  def draft(self, window, heads, tokens):
    """Head d+1 alone, after d tokens."""
    head, at = tokens.shape[1], jnp.zeros((len(tokens), 1), jnp.int32)
    room = jnp.pad(window.cache[0], ((0, 0), (0, self.n_future)))
    text = put(room, tokens, window.start + 1)
    return self._logits(text, head, window.start[:, None] + at), window

  def logits(self, window, head, at):
    assert head == 0  # the others answer in `draft` alone
    return self._logits(window.cache[0], head, window.start[:, None] + at)

  def _logits(self, text, head, position):
    ahead = jnp.pad(text, ((0, 0), (0, self.n_future - 1)))
    return jnp.take_along_axis(self.net(ahead)[head], position[..., None], 1)


def put(text, tokens, start):
  """The text [B, S] with tokens [B, W] at positions [B] of its rows."""

  def one(row, new, start):
    return jax.lax.dynamic_update_slice_in_dim(row, new, start, 0)

  return jax.vmap(one)(text, tokens, start)
