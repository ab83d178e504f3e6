"""The key and value cache of one layer, with an offset for each row.

A layer's cache is a tuple of arrays [B, K, S, *]: (k, v), or with int8
(k, v, k_scale, v_scale). Attention reads [B, K, S, C] as it lies; in the
model's own order [B, S, K, C] every pass would first copy it.

Position p is stored in slot p, or in a ring in slot p % S. A model that attends
to a bounded window can then write any number of tokens.
"""

import jax
import jax.numpy as jnp

from mtp_jax.decode import cpu, int8
from mtp_jax.decode import tree as tree_lib

DTYPES = ("float32", "bfloat16", "int8")
STEP = 128  # a growing cache has a multiple of so many positions


def empty(
  batch: int, kv_heads: int, cache_len: int, channels: int, dtype: str
) -> tuple[jax.Array, ...]:
  """Zeros for one layer, kept in one of `DTYPES`.

  Int8 takes one float32 scale per position and kv head, a token's largest
  channel over 127.
  """
  shape = batch, kv_heads, cache_len
  stored = [jnp.zeros((*shape, channels), dtype) for _ in range(2)]
  if dtype == "int8":
    stored += [jnp.zeros((*shape, 1), jnp.float32) for _ in range(2)]
  return tuple(stored)


def length(layer_cache: tuple) -> int:
  """S, the number of positions in a layer's cache."""
  return layer_cache[0].shape[2]


def stored(k: jax.Array, v: jax.Array, dtype: str) -> tuple[jax.Array, ...]:
  """k, v [B, W, K, C] of a window as a cache keeps them, [B, K, W, *] each."""
  k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
  if dtype != "int8":
    return k.astype(dtype), v.astype(dtype)
  (k, k_scale), (v, v_scale) = (int8.quantise(x, -1) for x in (k, v))
  return k, v, k_scale, v_scale


def write(layer_cache: tuple, new: tuple, start: jax.Array, **where) -> tuple:
  """The layer's cache with a window at each row's own offset.

  Args:
    layer_cache: from `empty`.
    new: from `stored`.
    start: [B] int32 first position. Outside a ring start + W <= S, or the
      write would be clamped.
    **where: `ring` and `valid` of `put`.
  """
  return tuple(
    put(a, b, start, **where) for a, b in zip(layer_cache, new, strict=True)
  )


def put(old, new, start, *, ring: bool = False, valid=None):
  """old [B, K, S, *] with new [B, K, W, *] from `start` [B] on.

  With `ring`, position p is stored in slot p % S, and `valid` [B] counts the
  positions of the window that are written. The others are padding, and would
  overwrite positions that are still in use.
  """
  by_row = _put_in_ring if ring else _put_in_order

  def by_kv_head(old, new, start, valid):
    # Of one row. XLA's CPU compiler would fuse the update of a single row into
    # the products that read the cache, and copy the cache four times for that.
    old, new = (jnp.swapaxes(a, 0, 1) for a in (old, new))
    start, valid = jax.tree.map(
      lambda a: jnp.repeat(a, len(old)), (start, valid)
    )
    return jnp.swapaxes(by_row(old, new, start, valid), 0, 1)

  on_cpu = {"cpu": by_kv_head} if len(old) == 1 else {}
  return jax.lax.platform_dependent(
    old, new, start, valid, **on_cpu, default=by_row
  )


def _put_in_order(old, new, start, valid):
  def one(old, new, start):
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, 1)

  del valid
  return jax.vmap(one)(old, new, start)


def _put_in_ring(old, new, start, valid):
  S, W = old.shape[2], new.shape[2]
  place = jnp.arange(W, dtype=jnp.int32)
  slot = (start[:, None] + place) % S
  if valid is not None:
    slot = jnp.where(place < valid[:, None], slot, S)
  rows = jnp.arange(old.shape[0])[:, None]
  new = jnp.swapaxes(new, 1, 2)
  return old.at[rows, :, slot].set(new, mode="drop")


def attend(mask, q, k, v, k_scale=None, v_scale=None) -> jax.Array:
  """Attention of a window over a layer's cache, [B, W, H, C] in q's dtype.

  The queries of one kv head, Q = W H / K of them, are the rows of one product
  over the cache as it lies (`jax.nn.dot_product_attention` has another order of
  axes). Scores and softmax are float32. Products are in the wider of q's dtype
  and the cache's; a narrower cache is converted, on a CPU into a copy. An int8
  one's scales belong to positions, so they move to the scores and the weights.

  Args:
    mask: [B, W, S] bool, what each query sees.
    q: [B, W, H, C], H a multiple of K.
    k, v, k_scale, v_scale: the layer's cache, from `write`.
  """
  B, W, H, C = q.shape
  K, G = k.shape[1], H // k.shape[1]
  q = jnp.swapaxes(q.reshape(B, W, K, G, C), 1, 2).reshape(B, K, W * G, C)
  dtype = jnp.promote_types(q.dtype, k.dtype)
  scores = cpu.scores(q.astype(dtype), k.astype(dtype))
  if k_scale is not None:
    scores *= jnp.swapaxes(k_scale, 2, 3)
  mask = jnp.repeat(mask[:, None], G, 2)
  weights = jax.nn.softmax(jnp.where(mask, scores * C**-0.5, -jnp.inf))
  if v_scale is not None:
    weights *= jnp.swapaxes(v_scale, 2, 3)
  out = jnp.einsum("BKQS,BKSC->BKQC", weights.astype(dtype), v.astype(dtype))
  out = out.astype(q.dtype)
  return jnp.swapaxes(out.reshape(B, K, W, G, C), 1, 2).reshape(B, W, H, C)


def pick(new: tuple, places: jax.Array) -> tuple:
  """A window's `places` [B, W'], in that order; `new` is from `stored`."""
  return tuple(jnp.take_along_axis(a, places[:, None, :, None], 2) for a in new)


def ladder(needed: int) -> int:
  """Positions of a cache for `needed` ones, on a ladder of steps by half.

  Steps are rounded up to a multiple of `STEP`. An attention pass costs what the
  cache has, so it may not be much larger than what is in it; and every size
  compiles a program, so they are few. The ladder begins at 512 positions, and
  on a CPU, where attention over many rows is most of a pass, at 256.
  """
  size = 256 if jax.default_backend() == "cpu" else 512
  while size < needed:
    size = rounded(size + size // 2)
  return size


def rounded(positions: int) -> int:
  """`positions`, rounded up to a multiple of `STEP`."""
  return -(-positions // STEP) * STEP


def grow(layer_cache: tuple, cache_len: int) -> tuple:
  """Room for `cache_len` positions, at least as many as there are."""
  return tuple(
    jnp.pad(a, ((0, 0), (0, 0), (0, cache_len - a.shape[2]), (0, 0)))
    for a in layer_cache
  )


def slot_positions(
  cache_len: int, start: jax.Array, width: int, *, ring: bool = False
) -> jax.Array:
  """Which position each slot holds, [B, S] or [1, S] int32.

  In a ring this is the last position written to the slot, once a window of
  `width` has been written from `start` [B] on. Empty slots are negative.
  """
  slot = jnp.arange(cache_len, dtype=jnp.int32)[None]
  if not ring:
    return slot
  last = start[:, None] + width - 1
  return last - (last - slot) % cache_len


def visible(
  cache_len: int,
  start: jax.Array,
  places: jax.Array,
  width: int,
  tree: tree_lib.Tree | None = None,
  sliding_window: int | None = None,
) -> jax.Array:
  """Which slots the tokens of a window see, once it has been written.

  Args:
    cache_len: S, the number of slots.
    start: [B] int32, each row's position of the window's first token.
    places: [B or 1, W'] int32 in the window, of the tokens that look.
    width: W.
    tree: topology of drafts; None: the window is text.
    sliding_window: tokens that each looks back to, itself included, in a ring;
      None: all of them.

  Returns:
    [B, W', S] bool.
  """
  ring = bool(sliding_window)
  key_positions = slot_positions(cache_len, start, width, ring=ring)
  depth = places if tree is None else jnp.asarray(tree.depth)[places]
  positions = start[:, None] + depth
  mask = key_positions[:, None] <= positions[..., None]
  if tree is not None and not tree.is_chain:
    # Keys of the text are seen by all nodes, keys of the window by the tree's
    # mask, which is written into the mask like K and V into the cache.
    sees = jnp.broadcast_to(
      jnp.asarray(tree.ancestor_mask)[places], (*mask.shape[:2], width)
    )
    text = (key_positions < start[:, None])[:, None]
    mask = jnp.broadcast_to(text, mask.shape)
    mask = put(mask[..., None], sees[..., None], start, ring=ring)[..., 0]
  if sliding_window:
    mask &= key_positions[:, None] >= 0
    if tree is not None:
      # The slot of a draft follows from its number in the tree, its position
      # from its depth.
      node = jnp.clip(key_positions - start[:, None], 0, width - 1)
      placed = start[:, None] + jnp.asarray(tree.depth)[node]
      key_positions = jnp.where(
        key_positions < start[:, None], key_positions, placed
      )
    mask &= key_positions[:, None] > positions[..., None] - sliding_window
  return mask
