"""The decoder: passes of a model over windows of tokens after a cached text.

A window [B, W] is text, or drafts: the last token of the text and a tree (or
chain) of drafts after it. The rule for K and V, heads and trees:

* K and V of a window are written at positions `start` + 0, 1, ..., W-1 of each
  row. Positions from `start` on are never read by anything earlier, so a
  smaller `start` rolls the cache back.
* A node of a tree attends to the text and to its ancestors. Its rotary
  position is `start` plus its depth.
* `forward` of text runs the trunk, and every head in use writes its K and V.
* `forward` of drafts runs the trunk on all M nodes. Only the verifying heads,
  which head 1's logits need, write K and V: head 1, or in an anticausal model
  all heads.
* `keep_path` moves K and V of a tree's accepted path to consecutive positions;
  a chain's lie there already. The other heads then write theirs, on the k
  tokens of that path.
* `logits` and `draft` run a head's query, attention and MLP at the places asked
  for. A head that another head reads has run before, on the whole window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax import config
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers

_static = {"static": True}
# Within a program, layers of one shape are traced and lowered only once.
project_kv = jax.jit(layers.Block.project_kv)
mix = jax.jit(layers.Block.mix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transformer:
  """A model's weights as `mtp_jax.lay_out` arranges them: the decoder."""

  embed: nnx.Param  # [V, D]
  trunk: tuple[layers.Block, ...]
  # N modules: `layers.Block`, `heads_lib.Linear`, or None of a kind without.
  head_modules: tuple
  norm: nnx.Param  # [D]
  unembed: tuple  # [D, V]: one shared, or head 1's and the drafts', or N
  cfg: config.Model = dataclasses.field(metadata=_static)
  vocab: int = dataclasses.field(metadata=_static)  # ids read and written
  sliding_window: int | None = dataclasses.field(metadata=_static)
  cache_dtype: str = dataclasses.field(metadata=_static)
  mesh: jax.sharding.Mesh | None = dataclasses.field(metadata=_static)
  # [V] of `layout.limit_drafts`: the column of each id in the unembedding of
  # heads 2..N, or the number of its columns where it has none.
  draft_columns: jax.Array | None = None

  @property
  def n_future(self) -> int:
    """N, the number of heads."""
    return self.cfg.n_future

  @property
  def row_step(self) -> int:
    """Devices that share the rows; the batch has to be a multiple of it."""
    return self.mesh.shape["data"] if self.mesh else 1

  def empty_cache(self, batch: int, cache_len: int, heads: int) -> tuple:
    """Zeros for the trunk and for those heads that the first k need.

    Args:
      batch: B; on a mesh a multiple of its axis 'data'.
      cache_len: positions S; with a sliding window, its ring's at most.
      heads: k; every pass over the cache uses so many.

    Returns:
      A `cache.empty` of each trunk layer, then of each head.
    """
    cfg = self.cfg
    if batch % self.row_step:
      raise ValueError(
        f"{batch} rows do not divide by the {self.row_step} devices of axis "
        "'data'"
      )
    cache_len = self._at_most(cache_len)
    if self._kind.feeds < 0:  # head 1 reads the others
      heads = self.n_future
    count = len(self.trunk) + (heads if cfg.head_layers else 0)
    shape = batch, cfg.kv_heads, cache_len, cfg.channels
    return self._split(
      tuple(cache_lib.empty(*shape, self.cache_dtype) for _ in range(count))
    )

  def capacity(self, cache: tuple) -> int | None:
    """Positions that fit; None: a whole ring, which takes any number."""
    cache_len, sliding = cache_lib.length(cache[0]), self.sliding_window
    if sliding and cache_len == sliding + window_lib.CHUNK:
      return None
    return cache_len

  def grow(self, cache: tuple, cache_len: int) -> tuple:
    """The same cache with room for `cache_len` positions."""
    cache_len = self._at_most(cache_len)
    return self._split(tuple(cache_lib.grow(a, cache_len) for a in cache))

  def forward(
    self,
    cache: tuple,
    tokens: jax.Array,
    start: jax.Array,
    *,
    tree: tree_lib.Tree | None = None,
    valid: jax.Array | None = None,
  ) -> window_lib.Window:
    """Runs the trunk over a window, and the heads as the module says.

    Args:
      cache: from `empty_cache` or an earlier Window.
      tokens: [B, W] int32; start + W <= S, or the write would be clamped.
      start: [B] int32, each row's position of tokens[:, 0].
      tree: topology of a window of drafts, which sets the attention mask; None:
        the window is text.
      valid: [B] tokens of a prompt from `start` on; those behind them in the
        window are padding, which must not enter a ring.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    ctx = self._context(start, tokens.shape[1], places, cache, tree, valid)
    x = self.embed[tokens].astype(self.cfg.dtype)
    order = self._order(len(cache) - len(self.trunk))
    # Until the trunk has run, the window's `trunk` is the embeddings.
    window = window_lib.Window(cache, start, x, tree=tree, cached_heads=order)
    for index, block in enumerate(self.trunk):
      window = self._cache_kv(window, index, block, x, ctx, valid)
      x = mix(block, x, ctx, *window.cache[index])
    window = dataclasses.replace(window, trunk=x)
    if tree is not None:
      order = self._verifying(window)
    window = self._run(window, order, ctx, valid)
    branches = tree is not None and not tree.is_chain
    return window if branches else dataclasses.replace(window, kv={})

  def logits(
    self, window: window_lib.Window, head: int, at: jax.Array
  ) -> jax.Array:
    """Float32 logits [B, W', V] of one head at some places of the window.

    Equals `model(tokens)[head]` at those positions. Ids beyond `vocab`, a
    padded vocabulary's, get -inf.

    Args:
      window: from `forward` or `keep_path`.
      head: from 0 to k-1; 0 predicts the next token, i the token i further.
        Of drafts before `keep_path`, a verifying head.
      at: [B, W'] int32, places (nodes of a tree) within the window.

    Raises:
      ValueError: a head without a cache, or one that waits for `keep_path`.
    """
    return self._unembed(self._hidden(window, head, at), head)

  def draft(
    self, window: window_lib.Window, heads: int, tokens: jax.Array
  ) -> tuple[jax.Array, window_lib.Window]:
    """Float32 logits [B, k-1, V] of heads 2..k after a window of one token.

    Equals `logits` head by head; an unembedding that they share is read once.

    Args:
      window: from `keep_path`, or of text.
      heads: k, at least 2.
      tokens: [B, 1], not used: these heads read the trunk alone.
    """
    del tokens
    at = jnp.zeros((len(window.start), 1), jnp.int32)
    hidden = [self._hidden(window, i, at) for i in range(1, heads)]
    if self._kind.own_unembed:
      logits = [self._unembed(h, i) for i, h in enumerate(hidden, 1)]
      return jnp.concatenate(logits, 1), window
    return self._unembed(jnp.concatenate(hidden, 1), 1), window

  def keep_path(
    self, window: window_lib.Window, node: jax.Array
  ) -> window_lib.Window:
    """Keeps the path to the last accepted `node` [B] of the tree.

    The path's K and V come from the window, since a TPU would copy a cache
    that is both read and written. A path shorter than k repeats its last node;
    those entries of the cache lie behind the new `start`, where the next window
    overwrites them. The result's window is one token, the node's.
    """
    tree, cache = window.tree, list(window.cache)
    path = jnp.asarray(tree.path_nodes)[node]
    depth = jnp.asarray(tree.depth)[node]
    for index, new in window.kv.items():
      kept = cache_lib.pick(new, path)
      cache[index] = self._put(cache[index], kept, window.start)
    window = dataclasses.replace(
      window.at(path, window.start), cache=tuple(cache), kv={}, tree=None
    )
    places = jnp.arange(tree.heads, dtype=jnp.int32)[None]
    ctx = self._context(window.start, tree.heads, places, cache, None)
    window = self._run(window, self._deferred(window), ctx)
    window = window.at(depth[:, None], window.start + depth)
    return dataclasses.replace(window, kv={})

  @property
  def _kind(self) -> heads_lib.Kind:
    return heads_lib.KINDS[self.cfg.head]

  def _order(self, count: int) -> range:
    """The first `count` heads, in the order in which they run."""
    # In an anticausal model head 1 is the last of the chain.
    return range(count)[::-1] if self._kind.feeds < 0 else range(count)

  def _verifying(self, window) -> range:
    """Those of the cached heads that head 1's logits need."""
    cached = window.cached_heads
    return cached if self._kind.feeds < 0 else cached[:1]

  def _deferred(self, window) -> range:
    """The other cached heads, which read drafts after `keep_path` alone."""
    return window.cached_heads[len(self._verifying(window)) :]

  def _run(self, window, order, ctx, valid=None):
    """Heads write K and V of the window; those that others read run on it.

    `order`: indices of cached heads, each behind those that it reads.
    """
    for i in order:
      index, block = len(self.trunk) + i, self.head_modules[i]
      x = self._read(window, i)
      window = self._cache_kv(window, index, block, x, ctx, valid)
      if self._kind.feeds and i != window.cached_heads[-1]:
        x = mix(block, x, ctx, *window.cache[index])
        window = dataclasses.replace(window, states=window.states | {i: x})
    return window

  def _read(self, window, head):
    """What a head reads, [B, W, D]: the head before it, or the trunk."""
    return window.states.get(head - self._kind.feeds, window.trunk)

  def _cache_kv(self, window, index, block, x, ctx, valid=None):
    """The window after a layer's K and V of x [B, W, D] are in cache[index]."""
    new = cache_lib.stored(*project_kv(block, x, ctx), self.cache_dtype)
    cache = list(window.cache)
    cache[index] = self._put(cache[index], new, window.start, valid)
    return dataclasses.replace(
      window, cache=tuple(cache), kv=window.kv | {index: new}
    )

  def _put(self, layer_cache, new, start, valid=None):
    ring = bool(self.sliding_window)
    return cache_lib.write(layer_cache, new, start, ring=ring, valid=valid)

  def _hidden(self, window, head, at):
    """What the unembedding of a head reads, [B, W', D]."""
    cached = window.cached_heads
    if self.cfg.head_layers and head not in cached:
      raise ValueError(f"head {head}, but the cache is for {len(cached)} heads")
    if window.tree is not None and head in self._deferred(window):
      raise ValueError(f"head {head} reads drafts after `keep_path` alone")
    has_run = head in window.states
    states = window.states[head] if has_run else self._read(window, head)
    x = jnp.take_along_axis(states, at[..., None], 1)
    module = self.head_modules[head]
    if head in cached and not has_run:
      width = states.shape[1]
      ctx = self._context(window.start, width, at, window.cache, window.tree)
      return mix(module, x, ctx, *window.cache[len(self.trunk) + head])
    return x if has_run or module is None else module(x, None)

  def _unembed(self, x, head):
    x = layers.rms_norm(x, self.norm[...], self.cfg.norm_eps)
    unembed = self.unembed[min(head, len(self.unembed) - 1)]
    logits = layers.product("BWD,DV->BWV", x, unembed, "float32")
    if head and self.draft_columns is not None:
      outside = jnp.full((*logits.shape[:-1], 1), -jnp.inf)
      logits = jnp.concatenate([logits, outside], -1)
      logits = jnp.take(logits, self.draft_columns, -1)
    padded = logits.shape[-1]
    if self.vocab < padded:
      logits = jnp.where(jnp.arange(padded) < self.vocab, logits, -jnp.inf)
    return logits

  def _context(self, start, width, places, cache, tree, valid=None):
    """How `places` [B or 1, W'] of a window of `width` tokens attend."""
    depth = places if tree is None else jnp.asarray(tree.depth)[places]
    positions = start[:, None] + depth
    cache_len, sliding = cache_lib.length(cache[0]), self.sliding_window
    mask = cache_lib.visible(cache_len, start, places, width, tree, sliding)
    attend = jax.tree_util.Partial(cache_lib.attend, mask)
    length = positions + 1  # as if the text had been read token by token
    if valid is not None:  # but for the prompt
      length = jnp.maximum(length, (start + valid)[:, None])
    return layers.context(positions, attend, self.cfg, length)

  def _at_most(self, cache_len: int) -> int:
    """`cache_len`; with a sliding window no more than a ring of it needs."""
    return (
      min(cache_len, self.sliding_window + window_lib.CHUNK)
      if self.sliding_window
      else cache_len
    )

  def _split(self, cache):
    """The cache over the mesh: rows over 'data', kv heads over 'model'."""
    if self.mesh is None:
      return cache
    where = NamedSharding(self.mesh, PartitionSpec("data", "model"))
    return jax.lax.with_sharding_constraint(cache, where)
