"""The model as a decoder sees it: windows at row offsets over a cache.

A decoding loop needs four methods of `Network` (tests use a mock with chosen
logits). `absorb` runs the trunk over a window and writes keys and values.
`predict` returns one head's logits at some positions; for drafts that is head
1. `commit` keeps the accepted path of a tree and runs the other heads on it.
`draft` returns the logits of those heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax import config
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import layers

CHUNK = 256  # most tokens of a prompt that one pass reads

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """The cache and hidden states after one pass over a window [B, W]."""

  cache: tuple  # see `Network.empty_cache`
  # [B, W, D] per head: its input, or its output if another head reads that.
  states: tuple
  start: jax.Array  # [B] position of the window's first token
  tree: tree_lib.Tree | None = dataclasses.field(metadata=_static)  # of drafts
  fresh: dict = dataclasses.field(default_factory=dict)  # the window's K, V


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """A model's weights as `prepare.decoder` lays them out."""

  embed: nnx.Param  # [V, D]
  trunk: tuple[layers.Block, ...]
  heads: tuple  # N of `layers.Block`, of `heads.Linear` or of None
  norm: nnx.Param  # [D]
  unembed: tuple  # [D, V]: one shared, or head 1's and the drafts', or N
  cfg: config.Model = dataclasses.field(metadata=_static)
  vocab: int = dataclasses.field(metadata=_static)  # ids read and written
  sliding_window: int | None = dataclasses.field(metadata=_static)
  cache_dtype: str = dataclasses.field(metadata=_static)
  mesh: jax.sharding.Mesh | None = dataclasses.field(metadata=_static)

  @property
  def n_future(self) -> int:
    """N, the number of heads."""
    return self.cfg.n_future

  @property
  def row_step(self) -> int:
    """Devices that share the rows; the batch has to be a multiple of it."""
    return self.mesh.shape["data"] if self.mesh else 1

  def empty_cache(self, batch: int, slots: int, heads: int) -> tuple:
    """Zeros for the trunk and for those heads that the first k need.

    Args:
      batch: B; on a mesh a multiple of its axis 'data'.
      slots: positions S; with a sliding window, those of its ring at most.
      heads: k; every pass over the cache reads for so many.

    Returns:
      A `cache.empty` of each trunk layer, then of each head.
    """
    cfg = self.cfg
    if batch % self.row_step:
      raise ValueError(
        f"{batch} rows do not divide by the {self.row_step} devices of axis "
        "'data'"
      )
    slots = self._at_most(slots)
    if cfg.head == "anticausal":  # head 1 reads all the others
      heads = self.n_future
    count = len(self.trunk) + (heads if cfg.head_layers else 0)
    channels = cfg.width // cfg.attn_heads
    return self._split(
      tuple(
        cache_lib.empty(batch, cfg.kv_heads, slots, channels, self.cache_dtype)
        for _ in range(count)
      )
    )

  def room(self, cache: tuple) -> int | None:
    """Positions that fit; None: a whole ring, which takes any number."""
    slots = cache_lib.slots(cache[0])
    if self.sliding_window and slots == self.sliding_window + CHUNK:
      return None
    return slots

  def grow(self, cache: tuple, slots: int) -> tuple:
    """The same cache with room for `slots` positions."""
    slots = self._at_most(slots)
    return self._split(tuple(cache_lib.grow(a, slots) for a in cache))

  def absorb(
    self,
    cache: tuple,
    tokens: jax.Array,
    start: jax.Array,
    *,
    tree: tree_lib.Tree | None = None,
    keep: jax.Array | None = None,
  ) -> Memory:
    """Runs the trunk over a window; trunk and heads write their K and V.

    Of drafts, only the trunk and the heads that head 1's logits need write K
    and V; the others do so for the accepted path, in `commit`. A head attends
    only at the positions of `predict`, unless another head reads its output.

    Args:
      cache: from `empty_cache` or an earlier Memory. Positions from `start` on
        are never read, so a smaller `start` rolls the cache back.
      tokens: [B, W] int32; start + W <= S, or the write would be clamped.
      start: [B] int32, each row's position of tokens[:, 0].
      tree: topology of a window of drafts, which sets the attention mask; None:
        the window is text.
      keep: [B] tokens of a prompt's window before its padding, which must not
        enter a ring.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    ctx = self._context(start, tokens.shape[1], places, cache, tree)
    memory = Memory(cache, (), start, tree)
    x = self.embed[tokens].astype(self.cfg.dtype)
    for slot, block in enumerate(self.trunk):
      memory = self._write(memory, slot, block, x, ctx, keep)
      x = block.mix(x, ctx, *memory.cache[slot])
    memory = dataclasses.replace(memory, states=(x,) * self.n_future)
    order, judging = self._order(cache)
    heads = order if tree is None else order[:judging]
    memory = self._read(memory, heads, ctx, keep)
    branches = tree is not None and not tree.is_chain
    return memory if branches else dataclasses.replace(memory, fresh={})

  def predict(self, memory: Memory, head: int, at: jax.Array) -> jax.Array:
    """Float32 logits [B, W', V] of one head at some places of the window.

    Equals `model(tokens)[head]` at those positions, without running the head
    anywhere else; for a parallel head this is its query, attention and MLP.
    Ids beyond `vocab`, a padded vocabulary's, get -inf.

    Args:
      memory: from `absorb` or `commit`.
      head: from 0 to k-1; 0 predicts the next token, i the token i further.
        Before `commit`, drafts have logits of head 0 alone, or of any head
        that head 0 reads.
      at: [B, W'] int32, places (nodes of a tree) within the window.

    Raises:
      ValueError: a head without a cache, or one that runs after `commit`.
    """
    return self._unembed(self._hidden(memory, head, at), head)

  def draft(self, memory: Memory, heads: int) -> jax.Array:
    """Float32 logits [B, k-1, V] of heads 2..k after a window of one token.

    Equals `predict` head by head; an unembedding that they share is read once.

    Args:
      memory: from `commit`, or of text.
      heads: k, at least 2.
    """
    at = jnp.zeros((len(memory.start), 1), jnp.int32)
    hidden = [self._hidden(memory, i, at) for i in range(1, heads)]
    if self.cfg.head == "unembedding":
      logits = [self._unembed(h, i) for i, h in enumerate(hidden, 1)]
      return jnp.concatenate(logits, 1)
    return self._unembed(jnp.concatenate(hidden, 1), 1)

  def commit(self, memory: Memory, node: jax.Array) -> Memory:
    """Keeps the path to the last accepted `node` [B] of the tree.

    The path's keys and values are written to consecutive positions of the
    cache. They come from the window, since a TPU would copy a cache that is
    both read and written. Heads that have not run on the drafts run on the
    path: k tokens, however large the tree. The result's window is one token,
    the node's.
    """
    tree, cache = memory.tree, list(memory.cache)
    path, depth = jnp.asarray(tree.path)[node], jnp.asarray(tree.depth)[node]
    for slot, new in memory.fresh.items():
      kept = cache_lib.pick(new, path)
      cache[slot] = self._put(cache[slot], kept, memory.start)
    memory = dataclasses.replace(
      _at(memory, path), cache=tuple(cache), tree=None
    )
    places = jnp.arange(tree.heads, dtype=jnp.int32)[None]
    ctx = self._context(memory.start, tree.heads, places, cache, None)
    order, judging = self._order(cache)
    memory = _at(self._read(memory, order[judging:], ctx), depth[:, None])
    return dataclasses.replace(memory, start=memory.start + depth, fresh={})

  def _order(self, cache) -> tuple[range, int]:
    """Heads with K and V as they run; how many of them head 1's logits need."""
    heads = range(len(cache) - len(self.trunk))
    if self.cfg.head == "anticausal":  # head 1 is the last of the chain
      return heads[::-1], len(heads)
    return heads, 1

  def _late(self, cache) -> range:
    """Heads whose output no other reads; they run only where logits are due."""
    order, _ = self._order(cache)
    return order if self.cfg.head == "parallel" else order[-1:]

  def _read(self, memory, heads, ctx, keep=None):
    """Heads write K and V of the window; those that others read run on it."""
    order, _ = self._order(memory.cache)
    for i in heads:
      slot, x = len(self.trunk) + i, memory.states[i]
      memory = self._write(memory, slot, self.heads[i], x, ctx, keep)
      if i not in self._late(memory.cache):
        x = self.heads[i].mix(x, ctx, *memory.cache[slot])
        above = order[order.index(i) :]
        states = (x if j in above else s for j, s in enumerate(memory.states))
        memory = dataclasses.replace(memory, states=tuple(states))
    return memory

  def _write(self, memory, slot, block, x, ctx, keep=None):
    """The memory with one layer's keys and values of the window x."""
    new = cache_lib.stored(*block.project_kv(x, ctx), self.cache_dtype)
    cache = list(memory.cache)
    cache[slot] = self._put(cache[slot], new, memory.start, keep)
    return dataclasses.replace(
      memory, cache=tuple(cache), fresh=memory.fresh | {slot: new}
    )

  def _put(self, layer, new, start, keep=None):
    ring = bool(self.sliding_window)
    return cache_lib.write(layer, new, start, ring=ring, keep=keep)

  def _hidden(self, memory, head, at):
    order, judging = self._order(memory.cache)
    if self.cfg.head_layers and head not in order:
      raise ValueError(f"head {head}, but the cache is for {len(order)} heads")
    if memory.tree is not None and head in order[judging:]:
      raise ValueError(f"head {head} reads drafts once `commit` has kept them")
    x = jnp.take_along_axis(memory.states[head], at[..., None], 1)
    if head in self._late(memory.cache):
      width = memory.states[0].shape[1]
      ctx = self._context(memory.start, width, at, memory.cache, memory.tree)
      return self.heads[head].mix(x, ctx, *memory.cache[len(self.trunk) + head])
    return self.heads[head](x, None) if self.cfg.head == "linear" else x

  def _unembed(self, x, head):
    x = layers.rms_norm(x, self.norm[...], self.cfg.norm_eps)
    unembed = self.unembed[min(head, len(self.unembed) - 1)]
    logits = layers.product("BWD,DV->BWV", x, unembed, "float32")
    padded = logits.shape[-1]
    if self.vocab < padded:
      logits = jnp.where(jnp.arange(padded) < self.vocab, logits, -jnp.inf)
    return logits

  def _context(self, start, width, places, cache, tree):
    """How `places` [B or 1, W'] of a window of `width` tokens attend."""
    held = cache_lib.held(
      cache_lib.slots(cache[0]), start, width, ring=bool(self.sliding_window)
    )
    depth = places if tree is None else jnp.asarray(tree.depth)[places]
    positions = start[:, None] + depth
    mask = held[:, None] <= positions[..., None]  # [B, W', S]
    if tree is not None and not tree.is_chain:
      # The tree's mask goes to the cache positions of the window's keys.
      sees = jnp.broadcast_to(
        jnp.asarray(tree.sees)[places], (*mask.shape[:2], width)
      )
      mask = jnp.broadcast_to((held < start[:, None])[:, None], mask.shape)
      mask = cache_lib.put(
        mask[..., None], sees[..., None], start, ring=bool(self.sliding_window)
      )[..., 0]
    if self.sliding_window:
      mask &= held[:, None] >= 0
      if tree is not None:
        # A draft's slot follows its number, its position its depth.
        node = jnp.clip(held - start[:, None], 0, width - 1)
        placed = start[:, None] + jnp.asarray(tree.depth)[node]
        held = jnp.where(held < start[:, None], held, placed)
      mask &= held[:, None] > positions[..., None] - self.sliding_window
    attend = jax.tree_util.Partial(cache_lib.attend, mask)
    return layers.context(positions, attend, self.cfg)

  def _at_most(self, slots: int) -> int:
    """What a window of CHUNK tokens and those that it looks back to take."""
    return (
      min(slots, self.sliding_window + CHUNK) if self.sliding_window else slots
    )

  def _split(self, cache):
    """The cache over the mesh: rows over 'data', kv heads over 'model'."""
    if self.mesh is None:
      return cache
    where = NamedSharding(self.mesh, P("data", "model"))
    return jax.lax.with_sharding_constraint(cache, where)


def _at(memory: Memory, places: jax.Array) -> Memory:
  """The memory with its states at some places [B, W'] of the window."""
  states = tuple(
    jnp.take_along_axis(x, places[..., None], 1) for x in memory.states
  )
  return dataclasses.replace(memory, states=states)
