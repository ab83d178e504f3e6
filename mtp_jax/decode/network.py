"""The model as a decoder sees it: windows at row offsets over a cache.

A decoding loop needs two things of a model, `absorb` and `predict`; anything
that has them can be decoded (tests use a mock with chosen logits).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax import config
from mtp_jax.model import layers, model


class Memory(NamedTuple):
  """What one pass over a window [B, W] leaves behind."""

  cache: tuple  # (k, v) [B, S, K, C] of each trunk layer, then of each head
  states: tuple  # what each head reads (independent) or wrote (chain) [B, W, D]
  start: jax.Array  # [B] position of the window's first token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """Weights laid out for decoding: a tuple of layers, cast once.

  Training stacks layers and keeps float32; a decoding step reads every weight
  once, so a stack's slices and casts would cost as much as the step itself.
  """

  embed: jax.Array
  trunk: tuple[layers.Block, ...]
  heads: tuple
  norm: jax.Array
  unembed: jax.Array
  cfg: config.Model = dataclasses.field(metadata={"static": True})

  @property
  def vocab(self) -> int:
    return self.cfg.vocab

  @property
  def n_future(self) -> int:
    return self.cfg.n_future

  def empty_cache(self, batch: int, cache_len: int) -> tuple:
    """Zeros: (k, v) [batch, cache_len, K, C] for each layer and block head."""
    cfg = self.cfg
    shape = (batch, cache_len, cfg.kv_heads, cfg.width // cfg.attn_heads)
    zeros = lambda: jnp.zeros(shape, cfg.dtype)  # noqa: E731
    return tuple(
      (zeros(), zeros()) for _ in range(len(self.trunk) + cfg.head_layers)
    )

  def absorb(
    self, cache: tuple, tokens: jax.Array, start: jax.Array, heads: int
  ) -> Memory:
    """Runs the trunk over a window and writes every layer's K and V.

    Independent heads write their K and V on the window too, but attend only
    where `predict` asks them to. A chain of heads has to run on the window.

    Args:
      cache: from `empty_cache` or an earlier Memory; slots at and after
        `start` are overwritten, so rolling back is passing a smaller `start`.
      tokens: [B, W] int32.
      start: [B] int32, each row's position of tokens[:, 0].
      heads: how many heads will predict.
    """
    ctx = self._context(start, jnp.arange(tokens.shape[1]), cache)
    x = self.embed[tokens].astype(self.cfg.dtype)
    cache = list(cache)

    def write(slot, block, x):
      new = block.project_kv(x, ctx)
      cache[slot] = tuple(
        _write(old, n, start) for old, n in zip(cache[slot], new, strict=True)
      )

    for slot, block in enumerate(self.trunk):
      write(slot, block, x)
      x = block.mix(x, ctx, *cache[slot])
    first, states = len(self.trunk), [x] * self.n_future
    if self.cfg.head == "parallel":
      for i in range(heads):
        write(first + i, self.heads[i], x)
    elif self.cfg.head in ("causal", "anticausal"):
      causal = self.cfg.head == "causal"
      for i in range(heads) if causal else reversed(range(self.n_future)):
        write(first + i, self.heads[i], x)
        x = self.heads[i].mix(x, ctx, *cache[first + i])
        states[i] = x
    return Memory(tuple(cache), tuple(states), start)

  def predict(self, memory: Memory, head: int, at: jax.Array) -> jax.Array:
    """Float32 logits [B, W', V] of one head (from 0) at window places `at`.

    Args:
      memory: from `absorb`.
      head: 0 predicts the next token, i the token i further on.
      at: [B, W'] int32 indices into the window.
    """
    x = jnp.take_along_axis(memory.states[head], at[..., None], 1)
    if self.cfg.head == "parallel":
      slot = len(self.trunk) + head
      ctx = self._context(memory.start, at, memory.cache)
      x = self.heads[head].mix(x, ctx, *memory.cache[slot])
    elif self.cfg.head == "linear":
      x = self.heads[head](x, None)
    x = layers.rms_norm(x, self.norm, self.cfg.norm_eps)
    own = self.cfg.head == "unembedding"
    return jnp.einsum(
      "BWD,DV->BWV",
      x,
      self.unembed[head] if own else self.unembed,
      preferred_element_type=jnp.float32,
    )

  def _context(self, start, offsets, cache):
    positions = start[:, None] + offsets
    slots = jnp.arange(cache[0][0].shape[1])
    mask = slots <= positions[:, None, :, None]
    return layers.context(positions, mask, self.cfg)


def prepare(net: model.Model) -> Network:
  """Lays a trained model out for decoding; call it once, outside the loop."""
  cfg = net.cfg

  def cast(p):
    return p.replace(p.astype(cfg.dtype)) if len(p.axes) > 1 else p

  net = jax.tree.map(cast, net, is_leaf=lambda x: hasattr(x, "axes"))

  def unstack(tree, size):
    return tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(size))

  return Network(
    embed=net.embed[...],
    trunk=unstack(net.trunk, cfg.trunk_layers),
    heads=unstack(net.heads.layers, cfg.n_future),
    norm=net.heads.norm[...],
    unembed=net.heads.unembed[...],
    cfg=cfg,
  )


def _write(cache, new, start):
  """cache [B, S, K, C] with new [B, W, K, C] at each row's own offset."""
  put = lambda c, n, s: jax.lax.dynamic_update_slice_in_dim(c, n, s, 0)  # noqa: E731
  return jax.vmap(put)(cache, new, start)
