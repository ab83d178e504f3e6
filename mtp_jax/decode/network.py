"""The model as a decoder sees it: windows at row offsets over a cache.

A decoding loop needs what `Network` offers (tests use a mock with chosen
logits): `absorb` runs the trunk over a window and writes keys and values,
`predict` asks a head (of drafts, head 1) for logits at places of it, `commit`
keeps one path of a tree of drafts and lets the other heads read it, and `draft`
asks these.
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
  """What one pass over a window [B, W] leaves behind."""

  cache: tuple  # see `Network.empty_cache`
  states: tuple  # [B, W, D] per head: what it reads, or, run early, wrote
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
    """What a batch is a multiple of: the devices that share its rows."""
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
    if cfg.head == "anticausal":  # head 1 stands on all the others
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
    """Runs the trunk over a window; it and the heads write their K and V.

    Drafts are read by the trunk and by what head 1's logits need; the other
    heads wait for what `commit` keeps of them. A head attends only where it is
    asked to, unless another one, in a chain, stands on it.

    Args:
      cache: from `empty_cache` or an earlier Memory. What lies at and after
        `start` is never read, so rolling back is passing a smaller `start`.
      tokens: [B, W] int32; start + W <= S, or the write would be clamped.
      start: [B] int32, each row's position of tokens[:, 0].
      tree: topology of a window of drafts: what each token sees, and what
        `commit` chooses from; None: it is text.
      keep: [B] tokens of a prompt's window that are its own; the rest is
        padding, which a ring must not take.
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
        Of drafts, before `commit`, one that head 1 stands on: 0 as a rule.
      at: [B, W'] int32, places (nodes of a tree) within the window.

    Raises:
      ValueError: a head that the cache is not for, or that waits.
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
    """What drafts leave if the text goes on to `node` [B] of their tree.

    The path to the node is written again, to consecutive places of the cache
    (from the window: to read a cache and to write it, a TPU would copy it).
    Heads that have not read the drafts read the path, k tokens, however large
    the tree. What is left of the window is its last token.
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
    if self.cfg.head == "anticausal":  # head 1 stands at the end of the chain
      return heads[::-1], len(heads)
    return heads, 1

  def _late(self, cache) -> range:
    """Heads that no other stands on: they run where they are asked, alone."""
    order, _ = self._order(cache)
    return order if self.cfg.head == "parallel" else order[-1:]

  def _read(self, memory, heads, ctx, keep=None):
    """Heads write K and V of the window; those that others stand on run."""
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
      # What nodes see of one another lies where their keys do.
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
