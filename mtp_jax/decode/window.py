"""A window: the tokens that one pass of a decoder reads, after that pass."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode import tree as tree_lib

CHUNK = 256  # most tokens of a prompt that one pass reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
  """A window [B, W] after a pass: the cache, and what the heads read."""

  cache: tuple  # see `decoder.Transformer.empty_cache`
  start: jax.Array  # [B] position of the window's first token
  trunk: jax.Array  # [B, W, D] the trunk's output
  # Head -> [B, W, D] its output, of the heads that have run on all W places.
  states: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  # Index in the cache -> K and V of the window, if they may have to move.
  kv: dict[int, tuple] = dataclasses.field(default_factory=dict)
  # Of drafts that are not accepted yet; None: the window is text.
  tree: tree_lib.Tree | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  # Indices of those with K and V in the cache, in the order in which they run.
  cached_heads: range = dataclasses.field(
    default=range(0), metadata={"static": True}
  )

  def at(self, places: jax.Array, start: jax.Array) -> "Window":
    """Some places [B, W'] of the window, as one that begins at `start` [B]."""
    trunk, states = jax.tree.map(
      lambda x: jnp.take_along_axis(x, places[..., None], 1),
      (self.trunk, self.states),
    )
    return dataclasses.replace(self, start=start, trunk=trunk, states=states)
