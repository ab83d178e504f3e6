"""N heads of one kind, with what they share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config
from mtp_jax.model import layers
from mtp_jax.model.heads import kinds


class Inputs(NamedTuple):
  """What the heads read in one pass over whole windows; see `Model.read`."""

  z: jax.Array  # [B, T, D] trunk output
  ctx: layers.Context  # that the trunk ran in
  # [B, T+N-1, D] embeddings of the windows' tokens; None: the kind reads none.
  embedded: jax.Array | None = None
  sends: jax.Array | None = None  # [N] bool: gradients reach z; None: all do


class Own(NamedTuple):
  """What heads have each for themselves; arrays with a leading axis of heads.

  A model's norm, and the unembedding of most kinds, are shared instead.
  """

  layers: Any  # None if the kind has none
  unembed: nnx.Param | None  # [N, D, V]; None if the kind's heads share it


class Heads(nnx.Module):
  """N heads over the trunk's output, one norm, and the unembedding.

  Attributes:
    layers: stack of the kind's N layers, each array with a leading axis N;
      None if the kind has none.
    norm: scale [D] of the RMSNorm between head and unembedding, shared by all
      heads as in the released models.
    unembed: [D, V] shared, or [N, D, V] if each head has its own.
  """

  def __init__(self, cfg: config.Model, key: jax.Array):
    D, V, N = cfg.width, cfg.vocab, cfg.n_future
    k_layers, k_unembed = jax.random.split(key)
    self.cfg = cfg
    if self.kind.reads_tokens and cfg.offsets:
      raise ValueError(
        f"model.offsets is {cfg.offsets}, but {cfg.head} heads read the tokens "
        "before their targets: leave it out"
      )

    def unembedding(key):
      return layers.param(key, (D, V), ("embed", "vocab"), D)

    layer, own = self.kind.layer, self.kind.own_unembed
    self.layers = layer and layers.stack(lambda k: layer(cfg, k), k_layers, N)
    self.unembed = (
      layers.stack(unembedding, k_unembed, N) if own else unembedding(k_unembed)
    )
    self.norm = layers.ones(D)

  @property
  def kind(self) -> kinds.Kind:
    """The entry of `kinds.KINDS` that `cfg.head` names."""
    return kinds.KINDS[self.cfg.head]

  @property
  def order(self) -> list[int] | None:
    """Heads in the order in which each feeds the next; None: independent."""
    return self.kind.order(self.cfg.n_future)

  def replace(self, **parts) -> "Heads":
    """A copy with other `layers`, `norm` or `unembed`."""
    return layers.replace(self, **parts)

  def own(self, which: slice = slice(None)) -> Own:
    """The parts that belong to some heads alone, all by default."""
    unembed = self.unembed if self.kind.own_unembed else None
    return jax.tree.map(lambda a: a[which], Own(self.layers, unembed))

  def with_own(self, own: Own) -> "Heads":
    """Heads with these parts of their own, and with the shared parts of self.

    Their number may differ from that of self.
    """
    return self.replace(
      layers=own.layers,
      unembed=self.unembed if own.unembed is None else own.unembed,
      cfg=self.cfg.with_heads(len(jax.tree.leaves(own)[0])),
    )

  def __call__(self, inputs: Inputs) -> jax.Array:
    """Hidden states that the unembedding reads, [N, B, T, D].

    All heads' states are alive at once; `one_by_one` avoids that.
    """
    N = self.cfg.n_future

    def one(xs):
      layer, i = xs
      z, read = self.trunk_read(inputs, i), self.tokens_read(inputs, i)
      return self.run(layer, z, inputs.ctx, *read)

    if self.layers is None:
      z = inputs.z
      if inputs.sends is None:
        hidden = jnp.broadcast_to(z, (N, *z.shape))
      else:
        hidden = jnp.stack([self.trunk_read(inputs, i) for i in range(N)])
    elif self.order is None:
      # Not `vmap`: cuDNN's attention cannot be mapped with documents' mask.
      hidden = jax.lax.map(one, (self.layers, jnp.arange(N)))
    else:
      states = self._chain(inputs, self.order)
      hidden = jnp.stack([states[i] for i in range(N)])
    return self.normalise(hidden)

  def first(self, inputs: Inputs) -> jax.Array:
    """Head 1's hidden states [B, T, D], without heads that it does not need."""
    order = self.order or [0]
    needed = order[: order.index(0) + 1]
    return self.normalise(self._chain(inputs, needed)[0])

  def one_by_one(
    self,
    fun: Callable[[jax.Array, jax.Array, Any], Any],
    inputs: Inputs,
    xs: Any,
    wrap: Callable[[Callable], Callable] = lambda one: one,
  ) -> Any:
    """`fun(hidden, unembed, x)` of every head, of which one at a time is alive.

    Args:
      fun: takes a head's hidden states [B, T, D], its unembedding [D, V], and
        its part of `xs`.
      inputs: what the heads read.
      xs: a pytree of arrays with a leading axis N.
      wrap: of the loop's body, such as `jax.checkpoint`.

    Returns:
      The results of `fun`, stacked along a leading axis N.
    """
    chain = self.order is not None

    def one(state, xs):
      layer, unembed, i, x = xs
      read = self.tokens_read(inputs, i)
      z = state if chain else self.trunk_read(inputs, i)
      state = self.run(layer, z, inputs.ctx, *read)
      unembed = self.unembed[...] if unembed is None else unembed
      found = fun(self.normalise(state), unembed, x)
      return state if chain else None, found

    numbers = jnp.arange(self.cfg.n_future)
    xs = self.layers, self.unembed_stack, numbers, xs
    backwards = self.kind.feeds < 0
    start = inputs.z if chain else None
    return jax.lax.scan(wrap(one), start, xs, reverse=backwards)[1]

  def run(self, layer, x: jax.Array, ctx: layers.Context, *read) -> jax.Array:
    """One head's layer on x [B, T, D], under the config's remat policy.

    Args:
      layer: from `layer`, or None.
      x: z, or the state of the head before it in the chain.
      ctx: of the pass.
      *read: from `tokens_read`.
    """
    if layer is None:
      return x
    call = layers.rematerialise(
      lambda layer, x, *read: self.run_without_remat(layer, x, ctx, *read),
      self.cfg.remat,
    )
    return call(layer, x, *read)

  def run_without_remat(
    self, layer, x: jax.Array, ctx: layers.Context, *read
  ) -> jax.Array:
    """`run` without rematerialisation: all activations are kept."""
    if layer is None:
      return x
    return layer(layer.join(x, *read) if read else x, ctx)

  def trunk_read(self, inputs: Inputs, i: int | jax.Array) -> jax.Array:
    """z [B, T, D] as head i (from 0) reads it, which may hold gradients back.

    A head of a chain reads another head's state instead.
    """
    if inputs.sends is None:
      return inputs.z
    held_back = jax.lax.stop_gradient(inputs.z)
    return jnp.where(inputs.sends[i], inputs.z, held_back)

  def tokens_read(self, inputs: Inputs, i: int | jax.Array) -> tuple:
    """The embeddings [B, T, D] that head i (from 0) reads, in a tuple of one.

    The tuple is empty where the kind reads no tokens.
    """
    if not self.kind.reads_tokens:
      return ()
    T = inputs.z.shape[1]
    return (jax.lax.dynamic_slice_in_dim(inputs.embedded, i, T, 1),)

  def normalise(self, x: jax.Array) -> jax.Array:
    """The norm before the unembedding, on x [..., D]."""
    return layers.rms_norm(x, self.norm[...], self.cfg.norm_eps)

  def layer(self, i: int):
    """Head i's own layer (i from 0), or None."""
    return jax.tree.map(lambda a: a[i], self.layers)

  def unembedding(self, i: int) -> jax.Array:
    """Head i's unembedding [D, V] (i from 0), its own or the shared one."""
    return self.unembed[i] if self.kind.own_unembed else self.unembed[...]

  @property
  def unembed_stack(self) -> jax.Array | None:
    """[N, D, V] if each head has its own unembedding, None if they share it."""
    return self.unembed[...] if self.kind.own_unembed else None

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[N, B, T, D] -> float32 [N, B, T, V], the heads' own unembeddings."""
    own = "N" if self.kind.own_unembed else ""
    return jnp.einsum(
      f"NBTD,{own}DV->NBTV",
      hidden,
      self.unembed.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  def _chain(self, inputs, order):
    """States [B, T, D] by head, each head in `order` reading the one before."""
    states, x = {}, inputs.z
    for i in order:
      read = self.tokens_read(inputs, i)
      states[i] = x = self.run(self.layer(i), x, inputs.ctx, *read)
    return states
