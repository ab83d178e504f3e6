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

from mtp_jax.loss import cross_entropy
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers


def formula(
  heads: heads_lib.Heads,
  z: jax.Array,
  ctx: layers.Context,
  targets: jax.Array,
  scale: jax.Array,
  *,
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """The loss by its definition: every head's logits alive at once.

  Arguments and result as of `serial`; `block` and `shards` change nothing.
  """
  _check(heads, z, targets, scale, shards)
  del block
  logits = heads.logits(heads(z, ctx))
  nll = cross_entropy.token_nll(logits, targets).sum((1, 2))
  return nll @ scale, jax.lax.stop_gradient(nll)


def checkpointed(
  heads: heads_lib.Heads,
  z: jax.Array,
  ctx: layers.Context,
  targets: jax.Array,
  scale: jax.Array,
  *,
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Head after head under `jax.checkpoint`: memory flat in N, heads run twice.

  One head's [B, T, V] logits are alive. Arguments and result as of `serial`;
  `block` and `shards` change nothing.
  """
  _check(heads, z, targets, scale, shards)
  del block

  def head_nll(hidden, unembed, target):
    logits = cross_entropy.project(hidden, unembed.astype(hidden.dtype))
    return cross_entropy.token_nll(logits, target).sum()

  nll = _one_by_one(heads, z, ctx, targets, head_nll, jax.checkpoint)
  return nll @ scale, jax.lax.stop_gradient(nll)


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
  together, head after head, and keeps d(heads) and dz; the backward pass
  multiplies them by the cotangent. Undifferentiated, it computes values only.

  Args:
    heads: the model's heads.
    z: [B, T, D] trunk output.
    ctx: the context that the trunk ran in; a constant, without gradient.
    targets: [N, B, T] int32, -1 where there is none.
    scale: [N] float32 factor of each head's summed loss.
    block: positions of each sequence whose logits are alive at once.
    shards: devices that share the batch axis; each adds up its own gradient
      of the unembedding in float32, and they are summed once, at the end.

  Returns:
    (sum_i scale_i * nll_i, nll [N]), float32, nats summed over targets >= 0.
    No gradient flows through the second.

  Raises:
    ValueError: shapes that do not fit each other.

  Reference: the paper, figure 2 (independent heads), figure S11 (chains).
  """
  _check(heads, z, targets, scale, shards)
  total, nll = _serial(block, shards, heads, z, ctx, targets, scale)
  return total, jax.lax.stop_gradient(nll)


IMPLEMENTATIONS = {
  "serial": serial,
  "checkpointed": checkpointed,
  "formula": formula,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _serial(block, shards, heads, z, ctx, targets, scale):
  del shards
  head_nll = functools.partial(cross_entropy.cross_entropy, block=block)
  nll = _one_by_one(heads, z, ctx, targets, head_nll)
  return nll @ scale, nll


def _serial_fwd(block, shards, heads, z, ctx, targets, scale):
  run = _independent if heads.order is None else _chain
  nll, d_heads, d_z = run(block, shards, heads, z, ctx, targets, scale)
  return (nll @ scale, nll), (d_heads, d_z, nll)


def _serial_bwd(block, shards, saved, cotangents):
  del block, shards
  d_heads, d_z, nll = saved
  g, _ = cotangents
  d_heads, d_z = jax.tree.map(lambda d: (g * d).astype(d.dtype), (d_heads, d_z))
  return d_heads, d_z, None, None, g * nll


_serial.defvjp(_serial_fwd, _serial_bwd)


def _independent(block, shards, heads, z, ctx, targets, scale):
  """nll [N], d(heads) and dz of heads that all read z: figure 2."""
  own = _own_unembed(heads)
  zero = jnp.zeros((shards, *heads.unembed.shape[-2:]), jnp.float32)

  def hidden_state(layer, norm, z):
    # Without cfg.remat: the gradient is taken at once, so no activation waits.
    x = z if layer is None else layer(z, ctx)
    return layers.rms_norm(x, norm, heads.cfg.norm_eps)

  def one(sums, xs):
    d_norm, d_unembed, d_z = sums
    layer, unembed, target, weight = xs
    unembed = heads.unembed[...] if own is None else unembed
    hidden, pull = jax.vjp(hidden_state, layer, heads.norm[...], z)
    nll, d_hidden, d_unembed = cross_entropy.value_and_grads(
      hidden, unembed, target, weight, d_unembed, block
    )
    d_layer, d_norm_here, d_z_here = pull(d_hidden)
    d_own = None
    if own is not None:  # given out here, and the next head's begins at zero
      d_own, d_unembed = d_unembed.sum(0), zero
    sums = d_norm + d_norm_here, d_unembed, d_z + d_z_here
    return sums, (nll, d_layer, d_own)

  sums = jnp.zeros_like(heads.norm[...]), zero, jnp.zeros(z.shape, jnp.float32)
  xs = heads.layers, own, targets, scale
  sums, (nll, d_layers, d_own) = jax.lax.scan(one, sums, xs)
  d_norm, d_unembed, d_z = sums
  d_unembed = d_unembed.sum(0) if own is None else d_own
  d_heads = _gradients(heads, d_layers, d_norm, d_unembed)
  return nll, d_heads, d_z.astype(z.dtype)


def _chain(block, shards, heads, z, ctx, targets, scale):
  """nll [N], d(heads) and dz of heads that feed each other: figure S11.

  Unrolled: a scan would keep a copy of every head's weights for `pulls`.
  """
  states, pulls, nll, d_layers = {}, {}, {}, {}
  x = z
  for i in heads.order:
    x, pulls[i] = jax.vjp(
      lambda layer, x: heads.run(layer, x, ctx), heads.layer(i), x
    )
    states[i] = x

  d_norm = jnp.zeros_like(heads.norm[...])
  d_unembed = jnp.zeros((shards, *heads.unembed.shape), jnp.float32)
  d_x = jnp.zeros_like(z)
  for i in reversed(heads.order):
    # This head's loss waits for the gradient of the one that it feeds, so
    # that their logits and activations are not alive together.
    x, d_x = jax.lax.optimization_barrier((states[i], d_x))
    hidden, pull_norm = jax.vjp(
      lambda norm, x: layers.rms_norm(x, norm, heads.cfg.norm_eps),
      heads.norm[...],
      x,
    )
    nll[i], d_hidden, d_unembed = cross_entropy.value_and_grads(
      hidden, heads.unembed[...], targets[i], scale[i], d_unembed, block
    )
    d_norm_here, d_state = pull_norm(d_hidden)
    d_norm += d_norm_here
    d_layers[i], d_x = pulls[i](d_x + d_state)

  nll, d_layers = (
    jax.tree.map(lambda *rows: jnp.stack(rows), *(a[i] for i in sorted(a)))
    for a in (nll, d_layers)
  )
  return nll, _gradients(heads, d_layers, d_norm, d_unembed.sum(0)), d_x


def _one_by_one(heads, z, ctx, targets, head_nll, wrap=lambda one: one):
  """nll [N] by a scan over the heads; a chain carries its state along."""
  chain = heads.order is not None

  def one(state, xs):
    layer, unembed, target = xs
    state = heads.run(layer, state if chain else z, ctx)
    u = heads.unembed[...] if unembed is None else unembed
    nll = head_nll(heads.normalise(state), u, target)
    return state if chain else None, nll

  xs = heads.layers, _own_unembed(heads), targets
  backwards = heads.kind.feeds < 0
  start = z if chain else None
  return jax.lax.scan(wrap(one), start, xs, reverse=backwards)[1]


def _own_unembed(heads):
  """[N, D, V] if each head has its own unembedding, None if they share one."""
  return heads.unembed[...] if heads.kind.own_unembed else None


def _gradients(heads, d_layers, d_norm, d_unembed):
  """The parts as a pytree of the structure and the dtypes of `heads`."""
  d_unembed = d_unembed.astype(heads.unembed.dtype)
  return heads.replace(
    layers=d_layers,
    norm=heads.norm.replace(d_norm),
    unembed=heads.unembed.replace(d_unembed),
  )


def _check(heads, z, targets, scale, shards):
  N, B, T = heads.cfg.n_future, *z.shape[:2]
  if targets.shape != (N, B, T):
    raise ValueError(
      f"targets {targets.shape} do not fit {N} heads over z {z.shape}"
    )
  if scale.shape != (N,):
    raise ValueError(f"scale {scale.shape} does not fit {N} heads")
  if B % shards:
    raise ValueError(f"batch {B} is not divisible by {shards} shards")
