"""The multi-token loss, three ways.

All three compute the same function, sum_i scale_i * nll_i with
nll_i = -sum_t log P(x_{t+i} | z_{<=t}) in nats:

  formula       all heads at once, all logits alive: O(N B T V). The oracle.
  checkpointed  head after head; backward runs every head a second time.
  serial        head after head, each head's value and gradient in one go:
                nothing is run twice and no [B, T, V] array exists.

Reference: the paper, section 2 and figures 2 and S11.
"""

import functools

import jax
import jax.numpy as jnp

from mtp_jax import cross_entropy
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers, model


def future_targets(
  tokens: jax.Array, segments: jax.Array, n_future: int
) -> jax.Array:
  """Targets of every head: row i holds token t+1+i, or -1.

  Args:
    tokens: [B, T+N] int32: windows that carry N tokens after their end.
    segments: [B, T+N] int32 document numbers, 0 where there is no document.
    n_future: N.

  Returns:
    int32 [N, B, T]; -1 where t and t+1+i are not in the same document.
  """
  T = tokens.shape[1] - n_future
  if T < 1:
    raise ValueError(
      f"windows of {tokens.shape[1]} tokens hold no position for {n_future} "
      "future tokens"
    )
  here = segments[:, :T]

  def one(i):
    there = slice(1 + i, 1 + i + T)
    inside = (segments[:, there] == here) & (here > 0)
    return jnp.where(inside, tokens[:, there], -1)

  return jnp.stack([one(i) for i in range(n_future)])


def formula(heads, z, ctx, targets, scale, *, block=0, shards=1):
  """The loss as it is written: every head's logits alive at once.

  Same arguments and result as `serial`; `block` and `shards` are ignored.
  """
  del block, shards
  logits = heads.logits(heads(z, ctx))
  nll = cross_entropy.token_nll(logits, targets).sum((1, 2))
  return nll @ scale, jax.lax.stop_gradient(nll)


def checkpointed(heads, z, ctx, targets, scale, *, block=0, shards=1):
  """Head after head under `jax.checkpoint`: flat in N, every head run twice.

  Same arguments and result as `serial`; one head's [B, T, V] logits are alive.
  A chain of heads is run once as a whole, and only its outputs are taken one
  after another.
  """
  del block, shards
  chain = heads.order is not None
  own = heads.cfg.head == "unembedding"

  @jax.checkpoint
  def head_nll(layer, x, unembed, target):
    if not chain:
      x = heads.normalise(heads.run(layer, x, ctx))
    return cross_entropy.token_nll(
      cross_entropy.project(x, unembed.astype(x.dtype)), target
    ).sum()

  def one(total, xs):
    layer, x, unembed, target, weight = xs
    nll = head_nll(
      layer,
      z if x is None else x,
      heads.unembed[...] if unembed is None else unembed,
      target,
    )
    return total + weight * nll, nll

  xs = (
    None if chain else heads.layers,
    heads(z, ctx) if chain else None,
    heads.unembed[...] if own else None,
    targets,
    scale,
  )
  total, nll = jax.lax.scan(one, jnp.zeros(()), xs)
  return total, jax.lax.stop_gradient(nll)


def serial(
  heads: heads_lib.Heads,
  z: jax.Array,
  ctx: layers.Context,
  targets: jax.Array,
  scale: jax.Array,
  *,
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """The multi-token loss with memory that does not grow with N.

  Equals `formula`. The forward pass takes each head's value and gradient
  together, head after head, and keeps d(heads), d(unembed) and dz; the
  backward pass multiplies them by the cotangent. Without differentiation
  only the values are computed.

  Args:
    heads: the model's heads.
    z: [B, T, D] trunk output.
    ctx: the context that the trunk ran in.
    targets: [N, B, T] int32, -1 where there is none.
    scale: [N] float32 factor of each head's summed loss.
    block: positions whose logits are alive at once.
    shards: devices that share the batch axis; each adds up its own gradient
      of the unembedding in float32, and they are summed once at the end.

  Returns:
    (sum_i scale_i * nll_i, nll [N]), float32, nats summed over targets >= 0.
    No gradient flows through the second.

  Raises:
    ValueError: shapes that do not fit each other.

  Reference: the paper, figure 2 (independent heads), figure S11 (chains).
  """
  N, B = targets.shape[:2]
  if N != heads.cfg.n_future or targets.shape[1:] != z.shape[:2]:
    raise ValueError(
      f"targets {targets.shape} do not fit {heads.cfg.n_future} heads over "
      f"z {z.shape}"
    )
  if B % shards:
    raise ValueError(f"batch {B} is not divisible by {shards} shards")
  total, nll = _serial(block, shards, heads, z, ctx, targets, scale)
  return total, jax.lax.stop_gradient(nll)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _serial(block, shards, heads, z, ctx, targets, scale):
  del shards
  own = heads.cfg.head == "unembedding"
  order = heads.order or range(heads.cfg.n_future)
  if heads.order is None:

    def one(_, xs):
      layer, unembed, target = xs
      h = heads.normalise(heads.run(layer, z, ctx))
      u = heads.unembed[...] if unembed is None else unembed
      return None, cross_entropy.cross_entropy(h, u, target, block)

    xs = heads.layers, heads.unembed[...] if own else None, targets
    nll = jax.lax.scan(one, None, xs)[1]
  else:
    x, values = z, {}
    for i in order:
      x = heads.run(heads.layer(i), x, ctx)
      values[i] = cross_entropy.cross_entropy(
        heads.normalise(x), heads.unembed[...], targets[i], block
      )
    nll = jnp.stack([values[i] for i in sorted(values)])
  return nll @ scale, nll


def _serial_fwd(block, shards, heads, z, ctx, targets, scale):
  run = _independent if heads.order is None else _chain
  nll, d_heads, d_z = run(block, shards, heads, z, ctx, targets, scale)
  return (nll @ scale, nll), (d_heads, d_z, nll)


def _serial_bwd(block, shards, saved, cotangents):
  del block, shards
  d_heads, d_z, nll = saved
  g = cotangents[0]
  d_heads, d_z = jax.tree.map(lambda d: (g * d).astype(d.dtype), (d_heads, d_z))
  return d_heads, d_z, None, None, g * nll


_serial.defvjp(_serial_fwd, _serial_bwd)


def _independent(block, shards, heads, z, ctx, targets, scale):
  own = heads.cfg.head == "unembedding"
  zero = jnp.zeros((shards, *heads.unembed.shape[-2:]), jnp.float32)

  def one(carry, xs):
    d_norm, d_shared, d_z = carry
    layer, unembed, target, weight = xs

    def state(layer, norm, z):
      h = heads.run(layer, z, ctx)
      return layers.rms_norm(h, norm, heads.cfg.norm_eps)

    h, pull = jax.vjp(state, layer, heads.norm[...], z)
    u = heads.unembed[...] if unembed is None else unembed
    nll, d_h, d_u = cross_entropy.value_and_grads(
      h, u, target, weight, zero if own else d_shared, block
    )
    d_layer, d_n, d_z_head = pull(d_h)
    carry = d_norm + d_n, None if own else d_u, d_z + d_z_head
    return carry, (nll, d_layer, d_u.sum(0) if own else None)

  carry = (
    jnp.zeros_like(heads.norm[...]),
    None if own else zero,
    jnp.zeros(z.shape, jnp.float32),
  )
  xs = heads.layers, heads.unembed[...] if own else None, targets, scale
  (d_norm, d_shared, d_z), (nll, d_layers, d_own) = jax.lax.scan(one, carry, xs)
  d_unembed = d_own if own else d_shared.sum(0)
  d_heads = _gradients(heads, d_layers, d_norm, d_unembed)
  return nll, d_heads, d_z.astype(z.dtype)


def _chain(block, shards, heads, z, ctx, targets, scale):
  x, states, pulls = z, {}, {}
  for i in heads.order:
    x, pulls[i] = jax.vjp(
      lambda layer, x: heads.run(layer, x, ctx), heads.layer(i), x
    )
    states[i] = x
  d_norm = jnp.zeros_like(heads.norm[...])
  d_u = jnp.zeros((shards, *heads.unembed.shape), jnp.float32)
  d_x, nll, d_layers = jnp.zeros_like(z), {}, {}
  for i in reversed(heads.order):  # the last of the chain first, figure S11
    # The barrier keeps this head's loss from starting before the last one's
    # gradient is done: one head's logits at a time.
    x, d_x, d_u = jax.lax.optimization_barrier((states[i], d_x, d_u))
    h, pull_norm = jax.vjp(
      lambda norm, x: layers.rms_norm(x, norm, heads.cfg.norm_eps),
      heads.norm[...],
      x,
    )
    nll[i], d_h, d_u = cross_entropy.value_and_grads(
      h, heads.unembed[...], targets[i], scale[i], d_u, block
    )
    d_n, d_own = pull_norm(d_h)
    d_norm = d_norm + d_n
    d_layers[i], d_x = pulls[i](d_x + d_own)
  stacked = jax.tree.map(
    lambda *a: jnp.stack(a), *(d_layers[i] for i in sorted(d_layers))
  )
  nll = jnp.stack([nll[i] for i in sorted(nll)])
  return nll, _gradients(heads, stacked, d_norm, d_u.sum(0)), d_x


def _gradients(heads, d_layers, d_norm, d_unembed):
  """The parts as a pytree of the structure of `heads`."""
  grads = jax.tree.map(lambda a: a, heads)
  grads.layers = d_layers
  grads.norm = heads.norm.replace(d_norm)
  grads.unembed = heads.unembed.replace(d_unembed)
  return grads


IMPLEMENTATIONS = {
  "serial": serial,
  "checkpointed": checkpointed,
  "formula": formula,
}


def token_loss(
  net: model.Model,
  tokens: jax.Array,
  segments: jax.Array,
  targets: jax.Array,
  scale: jax.Array,
  *,
  loss: str = "serial",
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Trunk and loss of a batch.

  Args:
    net: the model.
    tokens: [B, T] int32.
    segments: [B, T] int32 document numbers.
    targets: [N, B, T] from `future_targets`.
    scale: [N], e.g. weights / number of targets.
    loss: a key of IMPLEMENTATIONS.
    block: see `serial`.
    shards: see `serial`.

  Returns:
    (scaled total, summed nats per head [N]).
  """
  ctx = layers.training_context(segments, net.cfg)
  z = net.run_trunk(tokens, ctx)
  call = IMPLEMENTATIONS[loss]
  return call(net.heads, z, ctx, targets, scale, block=block, shards=shards)
