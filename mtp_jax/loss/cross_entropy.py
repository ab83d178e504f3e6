"""Cross-entropy fused with the unembedding: no [B, T, V] array exists.

The logits of a block of positions are made, used and dropped before those of
the next block. Where a gradient is wanted it is taken while they are there,
with the three matrix products that the gradient needs anyway.

  cross_entropy    a differentiable function of hidden states and unembedding
  value_and_grads  value and gradient at once, for a caller that adds up the
                   unembedding's gradient over several heads (`loss.serial`)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Targets(NamedTuple):
  """What heads are to predict: of all heads, or of one without axis N."""

  tokens: jax.Array  # [N, B, T] int32, negative where there is none
  weight: jax.Array  # [N, B, T] float32, of each target's nats in the loss

  def weight_sums(self) -> jax.Array:
    """[N] float32: the sum of the weights of each head's targets."""
    return jnp.where(self.tokens >= 0, self.weight, 0.0).sum((-2, -1))


def project(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
  """Logits of hidden [B, T, D] under unembed [D, V]: float32 [B, T, V]."""
  return jnp.einsum(
    "BTD,DV->BTV", hidden, unembed, preferred_element_type=jnp.float32
  )


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log_softmax(logits)[targets] in nats, 0 where the target is negative.

  Args:
    logits: [..., V] float32.
    targets: [...] int32.

  Returns:
    float32 [...].
  """
  picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)
  nll = jax.nn.logsumexp(logits, -1) - picked[..., 0]
  return jnp.where(targets >= 0, nll, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
  hidden: jax.Array, unembed: jax.Array, targets: Targets, block: int
) -> jax.Array:
  """Summed cross-entropy of one head, fused with its unembedding.

  Equals (nll * targets.weight).sum() with
  nll = token_nll(project(hidden, unembed), targets.tokens), but only `block`
  positions' logits are alive at once, in the backward pass too. The matrix
  products run in `hidden`'s dtype, softmax and sums in float32.

  Args:
    hidden: [B, T, D].
    unembed: [D, V].
    targets: tokens and weight [B, T]; constants, without gradient.
    block: positions of each sequence whose logits are alive at once, at most.

  Returns:
    float32 scalar, nats.
  """
  u = unembed.astype(hidden.dtype)

  def one(nll, xs):
    h, target = xs
    here = token_nll(project(h, u), target.tokens) * target.weight
    return nll + here.sum(), None

  xs = in_blocks(hidden, block), targets_in_blocks(targets, block)
  return jax.lax.scan(one, jnp.zeros(()), xs)[0]


def _cross_entropy_fwd(hidden, unembed, targets, block):
  d_unembed = jnp.zeros((1, *unembed.shape), jnp.float32)
  nll, d_hidden, d_unembed = value_and_grads(
    hidden, unembed, targets, jnp.ones(()), d_unembed, block
  )
  return nll, (d_hidden, d_unembed[0].astype(unembed.dtype))


def _cross_entropy_bwd(block, grads, g):
  del block
  d_hidden, d_unembed = ((g * d).astype(d.dtype) for d in grads)
  return d_hidden, d_unembed, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def value_and_grads(
  hidden: jax.Array,
  unembed: jax.Array,
  targets: Targets,
  scale: jax.Array,
  d_unembed: jax.Array,
  block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`cross_entropy` and the gradient of scale * cross_entropy, in one pass.

  The unembedding's gradient is added to `d_unembed`, whose R slices each
  belong to a slice of the batch. With R = the devices along the batch axis
  the additions need no communication; whoever sums over R pays for it once.

  Args:
    hidden: [B, T, D].
    unembed: [D, V].
    targets: tokens and weight [B, T].
    scale: float32 scalar, a factor of the gradients, not of the value.
    d_unembed: float32 [R, D, V], R a divisor of B.
    block: positions of each sequence whose logits are alive at once, at most.

  Returns:
    nll, a float32 scalar in nats; d(hidden) in `hidden`'s dtype; `d_unembed`
    with the gradient added.
  """
  B, T, D = hidden.shape
  R, _, V = d_unembed.shape
  u = unembed.astype(hidden.dtype)

  def one(carry, xs):
    nll, d_u = carry
    h, target = xs
    logits = project(h, u)
    top = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - top)
    total = exps.sum(-1, keepdims=True)
    # A mask, not a gather: it fuses, and partitions over a sharded V.
    hit = jnp.arange(V) == target.tokens[..., None]
    valid, weight = target.tokens[..., None] >= 0, target.weight[..., None]
    picked = jnp.where(hit, logits, 0.0).sum(-1, keepdims=True)
    here = (jnp.log(total) + top - picked) * weight
    nll += jnp.where(valid, here, 0.0).sum()
    d_logits = (exps / total - hit) * jnp.where(valid, scale * weight, 0.0)
    d_logits = d_logits.astype(h.dtype)
    d_h = jnp.einsum(
      "BTV,DV->BTD", d_logits, u, preferred_element_type=jnp.float32
    )
    d_u += jnp.einsum(
      "RBTD,RBTV->RDV",
      h.reshape(R, B // R, -1, D),
      d_logits.reshape(R, B // R, -1, V),
      preferred_element_type=jnp.float32,
    )
    return (nll, d_u), d_h.astype(h.dtype)

  xs = in_blocks(hidden, block), targets_in_blocks(targets, block)
  (nll, d_unembed), d_hidden = jax.lax.scan(one, (jnp.zeros(()), d_unembed), xs)
  d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
  return nll, d_hidden, d_unembed


def targets_in_blocks(targets: Targets, block: int) -> Targets:
  """Targets [B, T] -> [blocks, B, T/blocks], as `in_blocks`."""
  return Targets(
    in_blocks(targets.tokens, block, fill=-1), in_blocks(targets.weight, block)
  )


def in_blocks(x: jax.Array, block: int, fill=0) -> jax.Array:
  """[B, T, ...] -> [blocks, B, T/blocks, ...]: T is cut, since B is sharded.

  A block has at most `block` positions. The last one is padded with `fill`.

  Blocks have equal sizes, so that little is padded. There are at least two:
  XLA unrolls a loop of one iteration, and would then keep a [D, V] term of
  `d_unembed` for every head of a chain.
  """
  if block < 1:
    raise ValueError(f"block {block} holds no position; it must be positive")
  B, T = x.shape[:2]
  size = -(-T // max(2, -(-T // block)))
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, -T % size)
  x = jnp.pad(x, pad, constant_values=fill)
  return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)
