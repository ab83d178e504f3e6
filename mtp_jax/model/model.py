"""Embedding, trunk, heads: the whole multi-token model."""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config
from mtp_jax.model import heads, layers


class Model(nnx.Module):
  """A shared trunk that N heads read (paper, section 2).

  A pytree of float32 parameters, each with its logical axes in metadata. It
  knows no mesh, loss or optimiser; pass it to jitted functions as an argument.

  Attributes:
    embed: [V, D], not tied to the unembedding (paper, footnote 1).
    trunk: stack of `cfg.trunk_layers` blocks, run by `jax.lax.scan`.
    heads: the N heads with their norm and unembedding.
  """

  def __init__(self, cfg: config.Model, key: jax.Array):
    cfg = cfg.check()
    k_embed, k_trunk, k_heads = jax.random.split(key, 3)
    self.cfg = cfg
    self.embed = layers.param(
      k_embed, (cfg.vocab, cfg.width), ("vocab", "embed"), cfg.width
    )
    self.trunk = layers.stack(
      lambda k: layers.Block(cfg, k), k_trunk, cfg.trunk_layers
    )
    self.heads = heads.Heads(cfg, k_heads)

  def replace(self, **parts) -> "Model":
    """A copy with another `embed`, `trunk` or `heads`."""
    return layers.replace(self, **parts)

  def look_up(self, tokens: jax.Array) -> jax.Array:
    """Embeddings of tokens [B, T], in the activations' dtype [B, T, D]."""
    return self.embed[tokens].astype(self.cfg.dtype)

  def run_trunk(self, tokens: jax.Array, ctx: layers.Context) -> jax.Array:
    """tokens [B, T] int32 -> z [B, T, D] in `cfg.dtype`."""

    def layer(x, block):
      return block(x, ctx), None

    layer = layers.rematerialise(layer, self.cfg.remat, scanned=True)
    with jax.named_scope("trunk"):  # for profiles and `experiments.plan`
      return jax.lax.scan(layer, self.look_up(tokens), self.trunk)[0]

  def __call__(
    self, tokens: jax.Array, segments: jax.Array | None = None
  ) -> jax.Array:
    """Logits of every head at every position.

    Args:
      tokens: [B, T] int32.
      segments: [B, T] int32 document numbers; None is one document.

    Returns:
      float32 [N, B, T, V]: row i scores token t+1+i. This is the naive form
      that keeps all logits alive; training uses `loss`, decoding `decode`.
    """
    segments = jnp.ones_like(tokens) if segments is None else segments
    ctx = layers.training_context(segments, self.cfg)
    z = self.run_trunk(tokens, ctx)
    return self.heads.logits(self.heads(z, ctx))


def count_parameters(cfg: config.Model) -> dict[str, int]:
  """Parameters of a config, without building it.

  Returns:
    {'total': all, 'layers': without embedding and unembedding}.
  """
  model = jax.eval_shape(lambda k: Model(cfg, k), jax.random.key(0))

  def size(tree):
    return sum(a.size for a in jax.tree.leaves(tree))

  total = size(model)
  ends = size(model.embed) + size(model.heads.unembed)
  return {"total": total, "layers": total - ends}
