"""The prediction heads: every architecture of the paper, section 2 and app. B.

A head is defined once and `jax.vmap` over its constructor makes the stack of
N, so each parameter below has a leading axis N. Head i (from 1) predicts
token t+i.

  parallel     head_i(z)                          one transformer layer each
  linear       W_i z                              one matrix each
  causal       head_i(...head_2(head_1(z)))       nearest token first
  anticausal   head_i(...head_{N-1}(head_N(z)))   furthest token first
  unembedding  z, and each head its own unembedding (the byte models' kind)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config
from mtp_jax.model import layers


class Linear(nnx.Module):
  """A head that is one matrix, without nonlinearity."""

  def __init__(self, cfg: config.Model, key: jax.Array):
    D = cfg.width
    self.w = layers.param(key, (D, D), ("embed", None), D)

  def __call__(self, x: jax.Array, ctx: layers.Context) -> jax.Array:
    """[B, T, D] -> [B, T, D]; reads nothing of `ctx`."""
    return layers.product("BTD,DE->BTE", x, self.w)


class Heads(nnx.Module):
  """N heads over the trunk's output, one norm, and the unembedding.

  Attributes:
    layers: stack of N `layers.Block` or `Linear`; None for 'unembedding'.
    norm: scale [D] of the RMSNorm between head and unembedding, shared by all
      heads as in the released models.
    unembed: [D, V] shared, or [N, D, V] for 'unembedding'.
  """

  def __init__(self, cfg: config.Model, key: jax.Array):
    D, V, N = cfg.width, cfg.vocab, cfg.n_future
    k_layers, k_unembed = jax.random.split(key)
    self.cfg = cfg

    def unembedding(key):
      return layers.param(key, (D, V), ("embed", "vocab"), D)

    if cfg.head == "unembedding":
      self.layers = None
      self.unembed = layers.stack(unembedding, k_unembed, N)
    else:
      kind = Linear if cfg.head == "linear" else layers.Block
      self.layers = layers.stack(lambda k: kind(cfg, k), k_layers, N)
      self.unembed = unembedding(k_unembed)
    self.norm = layers.ones(D)

  @property
  def order(self) -> list[int] | None:
    """Heads in the order in which each feeds the next; None: independent."""
    N = self.cfg.n_future
    chains = {"causal": range(N), "anticausal": range(N - 1, -1, -1)}
    return list(chains[self.cfg.head]) if self.cfg.head in chains else None

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
    own = "N" if self.cfg.head == "unembedding" else ""
    return jnp.einsum(
      f"NBTD,{own}DV->NBTV",
      hidden,
      self.unembed.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )
