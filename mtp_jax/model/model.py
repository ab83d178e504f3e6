"""Embedding, trunk, heads: the whole multi-token model."""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config
from mtp_jax.model import attention, heads, layers


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

  def read(
    self,
    tokens: jax.Array,
    segments: jax.Array,
    length: int | None = None,
    kernel: attention.Kernel = attention.xla,
    z: jax.Array | None = None,
  ) -> heads.Inputs:
    """What the heads read at the first T positions of windows.

    Args:
      tokens: [B, T'] int32. T' may be T; where the heads read tokens, it is at
        least T+N-1: head i reads token t+i-1.
      segments: [B, T'] int32 document numbers.
      length: T; None: of windows that carry the targets of all heads,
        T' - `cfg.reach`.
      kernel: of the attention, see `layers.training_context`.
      z: [B, T, D] trunk output of an earlier pass; None: the trunk runs.
    """
    N = self.cfg.n_future
    T = tokens.shape[1] - self.cfg.reach if length is None else length
    ctx = layers.training_context(segments[:, :T], self.cfg, kernel)
    z = self.run_trunk(tokens[:, :T], ctx) if z is None else z
    z, embedded = z.astype(self.cfg.dtype), None
    if self.heads.kind.reads_tokens:
      embedded = self.look_up(tokens[:, : T + N - 1])
    return heads.Inputs(z, ctx, embedded)

  def __call__(
    self, tokens: jax.Array, segments: jax.Array | None = None
  ) -> jax.Array:
    """Logits of every head at every position.

    Args:
      tokens: [B, T] int32; [B, T+N-1] where the heads read tokens.
      segments: document numbers of the tokens, int32; None: one document.

    Returns:
      float32 [N, B, T, V]: row i scores token t+1+i, or what `cfg.offsets`
      says. This is the naive form that keeps all logits alive; training uses
      `loss`, decoding `decode`.
    """
    segments = jnp.ones_like(tokens) if segments is None else segments
    ahead = (self.cfg.n_future - 1) * self.heads.kind.reads_tokens
    inputs = self.read(tokens, segments, tokens.shape[1] - ahead)
    return self.heads.logits(self.heads(inputs))


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
