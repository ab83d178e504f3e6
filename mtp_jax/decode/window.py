"""A window: the tokens that one pass of a decoder reads, after that pass."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode import tree as tree_lib

CHUNK = 256  # most tokens of a prompt that one pass reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
  """A window [B, W] after a pass: the cache, and the heads' hidden states.

  Every head is either in `inputs` or, once it has run, in `outputs`.
  """

  cache: tuple  # see `decoder.Transformer.empty_cache`
  start: jax.Array  # [B] position of the window's first token
  inputs: dict[int, jax.Array]  # head -> [B, W, D] what it reads
  outputs: dict[int, jax.Array]  # head -> [B, W, D] what it wrote
  # Layer of the cache -> its K and V of the window, if they may have to move.
  kv: dict[int, tuple] = dataclasses.field(default_factory=dict)
  # Of drafts that are not accepted yet; None: the window is text.
  tree: tree_lib.Tree | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  def at(self, places: jax.Array) -> "Window":
    """The window with the hidden states at some places [B, W'] of it."""
    inputs, outputs = jax.tree.map(
      lambda x: jnp.take_along_axis(x, places[..., None], 1),
      (self.inputs, self.outputs),
    )
    return dataclasses.replace(self, inputs=inputs, outputs=outputs)
