"""The model as a decoder sees it: windows at row offsets over a cache.

A decoding loop needs `empty_cache`, `absorb`, `predict`, `vocab` and
`n_future`; whatever has them can be decoded (tests use a mock with chosen
logits).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax import config
from mtp_jax.model import layers, model


class Memory(NamedTuple):
  """What one pass over a window [B, W] leaves behind."""

  cache: tuple  # (k, v) [B, K, S, C] of each trunk layer, then of each head
  states: tuple  # [B, W, D] per head: what it reads, or what its chain wrote
  start: jax.Array  # [B] position of the window's first token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """Weights laid out for decoding: a tuple of layers, cast once.

  Training stacks layers and keeps float32; a decoding pass reads every weight
  once, so a stack's slices and casts would cost as much as the pass itself.
  """

  embed: jax.Array  # [V, D]
  trunk: tuple[layers.Block, ...]
  heads: tuple  # N of `layers.Block`, of `heads.Linear` or of None
  norm: jax.Array  # [D]
  unembed: tuple[jax.Array, ...]  # one shared [D, V], or N of them
  cfg: config.Model = dataclasses.field(metadata={"static": True})

  @property
  def vocab(self) -> int:
    """Ids that prompts may hold and that are written."""
    return self.unembed[0].shape[-1]

  @property
  def n_future(self) -> int:
    return self.cfg.n_future

  def empty_cache(self, batch: int, cache_len: int, heads: int) -> tuple:
    """Zeros for the trunk and for those heads that the first k need.

    Attention reads [B, K, S, C] as it lies. In the model's own order
    [B, S, K, C] every pass would first copy every layer's keys and values.

    Returns:
      (k, v) of each layer, in `cfg.dtype`.
    """
    cfg = self.cfg
    shape = (batch, cfg.kv_heads, cache_len, cfg.width // cfg.attn_heads)
    slots = len(self.trunk) + len(self._caching(heads))
    return tuple(
      (jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
      for _ in range(slots)
    )

  def absorb(
    self, cache: tuple, tokens: jax.Array, start: jax.Array, heads: int
  ) -> Memory:
    """Runs the trunk over a window and writes every layer's K and V.

    Parallel heads write their K and V on the window too, but attend only
    where `predict` asks them to. A chain of heads has to run on the window.

    Args:
      cache: from `empty_cache` or an earlier Memory. What lies at and after
        `start` is never read, so rolling back is passing a smaller `start`.
      tokens: [B, W] int32; start + W <= S, or the write would be clamped.
      start: [B] int32, each row's position of tokens[:, 0].
      heads: k, the same for every pass over one cache.
    """
    ctx = self._context(start, jnp.arange(tokens.shape[1]), cache)
    cache, first = list(cache), len(self.trunk)

    def write(slot, block, x):
      old, new = cache[slot], block.project_kv(x, ctx)
      cache[slot] = _write(old[0], new[0], start), _write(old[1], new[1], start)

    def run(slot, block, x):
      write(slot, block, x)
      return block.mix(x, ctx, *cache[slot])

    x = self.embed[tokens].astype(self.cfg.dtype)
    for slot, block in enumerate(self.trunk):
      x = run(slot, block, x)
    states = [x] * self.n_future
    for i in self._caching(heads):
      if self.cfg.head == "parallel":
        write(first + i, self.heads[i], x)
      else:
        x = states[i] = run(first + i, self.heads[i], x)
    return Memory(tuple(cache), tuple(states), start)

  def predict(self, memory: Memory, head: int, at: jax.Array) -> jax.Array:
    """Float32 logits [B, W', V] of one head at some places of the window.

    Equals `model(tokens)[head]` at those positions, without running the head
    anywhere else; for a parallel head this is its query, attention and MLP.

    Args:
      memory: from `absorb`.
      head: from 0 to k-1; 0 predicts the next token, i the token i further.
      at: [B, W'] int32, places counted from the window's first token.
    """
    x = jnp.take_along_axis(memory.states[head], at[..., None], 1)
    if self.cfg.head == "parallel":
      ctx = self._context(memory.start, at, memory.cache)
      kv = memory.cache[len(self.trunk) + head]
      x = self.heads[head].mix(x, ctx, *kv)
    elif self.cfg.head == "linear":
      x = self.heads[head](x, None)
    x = layers.rms_norm(x, self.norm, self.cfg.norm_eps)
    return jnp.einsum(
      "BWD,DV->BWV",
      x,
      self.unembed[head if len(self.unembed) > 1 else 0],
      preferred_element_type=jnp.float32,
    )

  def _caching(self, heads: int) -> range:
    """Heads with K and V behind the first k of them, in running order."""
    if self.cfg.head == "anticausal":  # head 1 stands at the end of the chain
      return range(self.n_future - 1, -1, -1)
    return range(heads if self.cfg.head_layers else 0)

  def _context(self, start, places, cache):
    positions = start[:, None] + places
    slots = jnp.arange(cache[0][0].shape[2])
    mask = slots <= positions[:, None, :, None]  # [B, 1, W, S]
    attend = jax.tree_util.Partial(_attend_cache, mask)
    return layers.context(positions, attend, self.cfg)


def prepare(net: model.Model, vocab: int | None = None) -> Network:
  """Lays a trained model out for decoding; call it once, outside the loop.

  Matrices are cast to `cfg.dtype`, norms stay float32. In a float32 model the
  embeddings are shared with `net`, the layers are copies.

  Args:
    net: the model.
    vocab: the tokenizer's ids, where the model's vocabulary is padded beyond
      them; a padding id is then never written.

  Raises:
    ValueError: the model has fewer ids than that.
  """
  cfg = net.cfg
  vocab = cfg.vocab if vocab is None else vocab
  if vocab > cfg.vocab:
    raise ValueError(f"vocab {vocab} exceeds the model's {cfg.vocab} ids")

  def cast(p):
    return p.replace(p.astype(cfg.dtype)) if len(p.axes) > 1 else p

  net = jax.tree.map(cast, net, is_leaf=lambda x: hasattr(x, "axes"))

  def unstack(tree, size):
    return tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(size))

  unembed = net.heads.unembed[..., :vocab]
  own = cfg.head == "unembedding"
  return Network(
    embed=net.embed[...],
    trunk=unstack(net.trunk, cfg.trunk_layers),
    heads=unstack(net.heads.layers, cfg.n_future),
    norm=net.heads.norm[...],
    unembed=unstack(unembed, cfg.n_future) if own else (unembed,),
    cfg=cfg,
  )


def _attend_cache(mask, q, k, v):
  """Attention of q [B, W, H, C] over a cache's k and v [B, K, S, C]."""
  k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _write(cache, new, start):
  """cache [B, K, S, C] with new [B, W, K, C] at each row's own offset."""

  def row(cache, new, start):
    return jax.lax.dynamic_update_slice_in_dim(cache, new, start, 1)

  return jax.vmap(row)(cache, jnp.swapaxes(new, 1, 2), start)
