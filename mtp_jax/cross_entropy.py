"""Cross-entropy fused with the unembedding: no [B, T, V] array exists."""

import functools

import jax
import jax.numpy as jnp


def cross_entropy(
  hidden: jax.Array, unembed: jax.Array, targets: jax.Array, block: int
) -> jax.Array:
  """Summed cross-entropy of one head, fused with its unembedding.

  Equals -sum(log_softmax(hidden @ unembed)[targets]) over targets >= 0, but
  takes `block` positions at a time, so that no [B, T, V] array exists.
  Differentiated, it takes value and gradient of a block in the same pass.

  Args:
    hidden: [B, T, D].
    unembed: [D, V].
    targets: [B, T] int32, negative where there is none.
    block: positions of T whose logits are alive together.

  Returns:
    float32 scalar, nats.
  """
  return _cross_entropy(block, hidden, unembed, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(block, hidden, unembed, targets):
  u = unembed.astype(hidden.dtype)

  def one(total, xs):
    h, target = xs
    logits = project(h, u)
    return total + token_nll(logits, target).sum(), None

  xs = _in_blocks(hidden, block), _in_blocks(targets, block, fill=-1)
  return jax.lax.scan(one, jnp.zeros(()), xs)[0]


def _cross_entropy_fwd(block, hidden, unembed, targets):
  d_unembed = jnp.zeros((1, *unembed.shape), jnp.float32)
  nll, d_hidden, d_unembed = value_and_grads(
    hidden, unembed, targets, jnp.ones(()), d_unembed, block
  )
  return nll, (d_hidden, d_unembed[0].astype(unembed.dtype))


def _cross_entropy_bwd(block, grads, g):
  del block
  return *(jax.tree.map(lambda d: (g * d).astype(d.dtype), grads)), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def value_and_grads(hidden, unembed, targets, scale, d_unembed, block):
  """One head's nll [], d(scale * nll)/d(hidden), and `d_unembed` plus
  d(scale * nll)/d(unembed).

  `d_unembed` is [R, D, V] float32: each of R slices of the batch adds up its
  own gradient. With R = the number of devices along the batch the additions
  need no communication, and whoever sums over R pays for it once.
  """
  B, T, D = hidden.shape
  R, _, V = d_unembed.shape
  u = unembed.astype(hidden.dtype)

  def one(carry, xs):
    total, d_u = carry
    h, target = xs
    logits = project(h, u)
    top = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - top)
    norm = exps.sum(-1, keepdims=True)
    valid = (target >= 0)[..., None]
    hit = jnp.arange(V) == target[..., None]
    nll = jnp.log(norm) + top - jnp.where(hit, logits, 0).sum(-1, keepdims=True)
    d_logits = (exps / norm - hit) * jnp.where(valid, scale, 0.0)
    d_logits = d_logits.astype(h.dtype)
    d_h = jnp.einsum("BTV,DV->BTD", d_logits, u)
    d_u = d_u + jnp.einsum(
      "RBTD,RBTV->RDV",
      h.reshape(R, B // R, -1, D),
      d_logits.reshape(R, B // R, -1, V),
      preferred_element_type=jnp.float32,
    )
    return (total + jnp.where(valid, nll, 0.0).sum(), d_u), d_h

  xs = _in_blocks(hidden, block), _in_blocks(targets, block, fill=-1)
  (nll, d_unembed), d_hidden = jax.lax.scan(one, (jnp.zeros(()), d_unembed), xs)
  d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
  return nll, d_hidden, d_unembed


def project(h, u):
  return jnp.einsum("BTD,DV->BTV", h, u, preferred_element_type=jnp.float32)


def token_nll(logits, target):
  picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], -1)
  nll = jax.nn.logsumexp(logits, -1) - picked[..., 0]
  return jnp.where(target >= 0, nll, 0.0)


def _in_blocks(x, block, fill=0):
  """[B, T, ...] -> [T/block, B, block, ...]; T, not B, which is sharded."""
  B, T = x.shape[:2]
  block = min(block, T)
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, -T % block)
  x = jnp.pad(x, pad, constant_values=fill)
  return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)
