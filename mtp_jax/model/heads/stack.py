"""N heads of one kind, with what they share."""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config
from mtp_jax.model import layers
from mtp_jax.model.heads import kinds


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

  def run(self, layer, x: jax.Array, ctx: layers.Context) -> jax.Array:
    """One head's layer on x [B, T, D], under the config's remat policy."""
    if layer is None:
      return x
    call = layers.rematerialise(lambda f, x: f(x, ctx), self.cfg.remat)
    return call(layer, x)

  def normalise(self, x: jax.Array) -> jax.Array:
    """The norm before the unembedding, on x [..., D]."""
    return layers.rms_norm(x, self.norm[...], self.cfg.norm_eps)

  def __call__(self, z: jax.Array, ctx: layers.Context) -> jax.Array:
    """Hidden states that the unembedding reads: z [B, T, D] -> [N, B, T, D].

    All heads' states are alive at once; `loss.serial` avoids that.
    """
    if self.layers is None:
      hidden = jnp.broadcast_to(z, (self.cfg.n_future, *z.shape))
    elif self.order is None:
      # Not `vmap`: cuDNN's attention cannot be mapped with documents' mask.
      hidden = jax.lax.map(lambda f: self.run(f, z, ctx), self.layers)
    else:
      states = {}
      for i in self.order:
        z = self.run(self.layer(i), z, ctx)
        states[i] = z
      hidden = jnp.stack([states[i] for i in range(self.cfg.n_future)])
    return self.normalise(hidden)

  def layer(self, i: int):
    """Head i's own layer (i from 0), or None."""
    return jax.tree.map(lambda a: a[i], self.layers)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[N, B, T, D] -> float32 [N, B, T, V], the heads' own unembeddings."""
    own = "N" if self.kind.own_unembed else ""
    return jnp.einsum(
      f"NBTD,{own}DV->NBTV",
      hidden,
      self.unembed.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )
