"""The multi-token loss, three ways.

All three compute the same function: the sum over heads of scale_i * nll_i, with
nll_i = -sum_t weight_{t+i} log P_i(x_{t+i} | x_{<=t}) in nats.

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
  inputs: heads_lib.Inputs,
  targets: cross_entropy.Targets,
  scale: jax.Array,
  *,
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """The loss by its definition: every head's logits alive at once.

  Arguments and result as of `serial`; `block` and `shards` change nothing.
  """
  _check(heads, inputs, targets, scale, shards)
  del block
  logits = heads.logits(heads(inputs))
  nll = cross_entropy.token_nll(logits, targets.tokens) * targets.weight
  nll = nll.sum((1, 2))
  return nll @ scale, jax.lax.stop_gradient(nll)


def checkpointed(
  heads: heads_lib.Heads,
  inputs: heads_lib.Inputs,
  targets: cross_entropy.Targets,
  scale: jax.Array,
  *,
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Head after head under `jax.checkpoint`: memory flat in N, heads run twice.

  One head's [B, T, V] logits are alive. Arguments and result as of `serial`;
  `block` and `shards` change nothing.
  """
  _check(heads, inputs, targets, scale, shards)
  del block

  def head_nll(hidden, unembed, target):
    logits = cross_entropy.project(hidden, unembed.astype(hidden.dtype))
    nll = cross_entropy.token_nll(logits, target.tokens) * target.weight
    return nll.sum()

  nll = heads.one_by_one(head_nll, inputs, targets, jax.checkpoint)
  return nll @ scale, jax.lax.stop_gradient(nll)


def serial(
  heads: heads_lib.Heads,
  inputs: heads_lib.Inputs,
  targets: cross_entropy.Targets,
  scale: jax.Array,
  *,
  block: int = 256,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """total = sum_i scale_i nll_i, in memory that does not grow with N.

  nll_i = -sum_t weight_{t+i} log P_i(x_{t+i} | x_{<=t}) is head i's loss,
  summed over the batch. The forward pass takes each head's value and gradient
  together, head after head, and keeps the gradients of heads and inputs; the
  backward pass multiplies them by the cotangent. Undifferentiated, it computes
  values only.

  Args:
    heads: the model's heads.
    inputs: what the heads read, from `Model.read`. Gradients flow to `z` and
      `embedded`, none to `ctx`.
    targets: tokens and weight [N, B, T]; constants.
    scale: [N] float32 factor of each head's summed loss.
    block: positions of each sequence whose logits are alive at once.
    shards: devices that share the batch axis; each adds up its own gradient
      of the unembedding in float32, and they are summed once, at the end.

  Returns:
    (total, nll [N]), float32, nats. No gradient flows through the second.

  Raises:
    ValueError: shapes that do not fit each other.

  Example:
    >>> from mtp_jax import config
    >>> from mtp_jax.data import batch
    >>> from mtp_jax.loss import future_targets
    >>> from mtp_jax.model import model
    >>> cfg = config.Model(vocab=7, width=8, mlp=12, layers=3, n_future=2)
    >>> net = model.Model(cfg, jax.random.key(0))
    >>> windows = batch.of(jnp.arange(12).reshape(2, 6) % 7)
    >>> inputs = net.read(windows.tokens, windows.segments)
    >>> targets = future_targets(windows, 2)
    >>> scale = 1 / targets.weight_sums()  # nats per token
    >>> total, nll = serial(net.heads, inputs, targets, scale)
    >>> nll.shape, bool(total == nll @ scale)
    ((2,), True)

  Reference: the paper, figure 2 (independent heads), figure S11 (chains).
  """
  _check(heads, inputs, targets, scale, shards)
  total, nll = _serial(block, shards, heads, inputs, targets, scale)
  return total, jax.lax.stop_gradient(nll)


IMPLEMENTATIONS = {
  "serial": serial,
  "checkpointed": checkpointed,
  "formula": formula,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _serial(block, shards, heads, inputs, targets, scale):
  del shards
  head_nll = functools.partial(cross_entropy.cross_entropy, block=block)
  nll = heads.one_by_one(head_nll, inputs, targets)
  return nll @ scale, nll


def _serial_fwd(block, shards, heads, inputs, targets, scale):
  run = _independent if heads.order is None else _chain
  nll, d_heads, d_read = run(block, shards, heads, inputs, targets, scale)
  return (nll @ scale, nll), (d_heads, d_read, nll)


def _serial_bwd(block, shards, saved, cotangents):
  del block, shards
  d_heads, d_read, nll = saved
  g, _ = cotangents
  d_heads, (d_z, d_embedded) = jax.tree.map(
    lambda d: (g * d).astype(d.dtype), (d_heads, d_read)
  )
  d_inputs = heads_lib.Inputs(d_z, None, d_embedded, None)
  return d_heads, d_inputs, None, g * nll


_serial.defvjp(_serial_fwd, _serial_bwd)


def _independent(block, shards, heads, inputs, targets, scale):
  """nll [N], d(heads) and d(z, embedded) of heads that all read z: figure 2."""
  own = heads.unembed_stack
  zero = jnp.zeros((shards, *heads.unembed.shape[-2:]), jnp.float32)
  read = inputs.z, inputs.embedded

  def hidden_state(layer, norm, read, i):
    z, embedded = read
    here = inputs._replace(z=z, embedded=embedded)
    z, token = heads.trunk_read(here, i), heads.tokens_read(here, i)
    # Without cfg.remat: the gradient is taken at once, so no activation waits.
    x = heads.run_without_remat(layer, z, inputs.ctx, *token)
    return layers.rms_norm(x, norm, heads.cfg.norm_eps)

  def one(sums, xs):
    d_norm, d_unembed, d_read = sums
    layer, unembed, target, scale_i, i = xs
    unembed = heads.unembed[...] if own is None else unembed
    hidden, pull = jax.vjp(
      functools.partial(hidden_state, i=i), layer, heads.norm[...], read
    )
    nll, d_hidden, d_unembed = cross_entropy.value_and_grads(
      hidden, unembed, target, scale_i, d_unembed, block
    )
    d_layer, d_norm_here, d_read_here = pull(d_hidden)
    d_own = None
    if own is not None:  # given out here, and the next head's begins at zero
      d_own, d_unembed = d_unembed.sum(0), zero
    d_read = jax.tree.map(jnp.add, d_read, d_read_here)
    return (d_norm + d_norm_here, d_unembed, d_read), (nll, d_layer, d_own)

  sums = jnp.zeros_like(heads.norm[...]), zero, _zeros(read)
  numbers = jnp.arange(heads.cfg.n_future)
  xs = heads.layers, own, targets, scale, numbers
  sums, (nll, d_layers, d_own) = jax.lax.scan(one, sums, xs)
  d_norm, d_unembed, d_read = sums
  d_unembed = d_unembed.sum(0) if own is None else d_own
  d_heads = _gradients(heads, d_layers, d_norm, d_unembed)
  return nll, d_heads, _cast(d_read, read)


def _chain(block, shards, heads, inputs, targets, scale):
  """nll [N], d(heads) and d(z, embedded) of a chain of heads: figure S11.

  Unrolled: a scan would keep a copy of every head's weights for `pulls`.
  """
  states, pulls, nll, d_layers = {}, {}, {}, {}
  x, embedded = inputs.z, inputs.embedded

  def run(layer, x, embedded, i):
    token = heads.tokens_read(inputs._replace(embedded=embedded), i)
    return heads.run(layer, x, inputs.ctx, *token)

  for i in heads.order:
    x, pulls[i] = jax.vjp(
      functools.partial(run, i=i), heads.layer(i), x, embedded
    )
    states[i] = x

  d_norm = jnp.zeros_like(heads.norm[...])
  d_unembed = jnp.zeros((shards, *heads.unembed.shape), jnp.float32)
  d_x, d_embedded = jnp.zeros_like(inputs.z), _zeros(embedded)
  for i in reversed(heads.order):
    # This head's loss waits for the gradient of the one that it feeds, so
    # that their logits and activations are not alive together.
    x, d_x = jax.lax.optimization_barrier((states[i], d_x))
    hidden, pull_norm = jax.vjp(
      lambda norm, x: layers.rms_norm(x, norm, heads.cfg.norm_eps),
      heads.norm[...],
      x,
    )
    target = jax.tree.map(lambda a, i=i: a[i], targets)
    nll[i], d_hidden, d_unembed = cross_entropy.value_and_grads(
      hidden, heads.unembed[...], target, scale[i], d_unembed, block
    )
    d_norm_here, d_state = pull_norm(d_hidden)
    d_norm += d_norm_here
    d_layers[i], d_x, d_token = pulls[i](d_x + d_state)
    d_embedded = jax.tree.map(jnp.add, d_embedded, d_token)

  nll, d_layers = (
    jax.tree.map(lambda *rows: jnp.stack(rows), *(a[i] for i in sorted(a)))
    for a in (nll, d_layers)
  )
  d_heads = _gradients(heads, d_layers, d_norm, d_unembed.sum(0))
  return nll, d_heads, (d_x, _cast(d_embedded, embedded))


def _zeros(tree):
  """Sums of gradients begin here: float32, whatever the activations."""
  return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)


def _cast(sums, like):
  return jax.tree.map(lambda d, x: d.astype(x.dtype), sums, like)


def _gradients(heads, d_layers, d_norm, d_unembed):
  """The parts as a pytree of the structure and the dtypes of `heads`."""
  d_unembed = d_unembed.astype(heads.unembed.dtype)
  return heads.replace(
    layers=d_layers,
    norm=heads.norm.replace(d_norm),
    unembed=heads.unembed.replace(d_unembed),
  )


def _check(heads, inputs, targets, scale, shards):
  (B, T), N, kind = inputs.z.shape[:2], heads.cfg.n_future, heads.cfg.head
  for name, array in targets._asdict().items():
    if array.shape != (N, B, T):
      raise ValueError(
        f"targets' {name} {array.shape} do not fit {N} heads over z "
        f"{inputs.z.shape}"
      )
  if heads.kind.reads_tokens:
    if inputs.embedded is None:
      raise ValueError(
        f"{kind} heads read tokens, but inputs.embedded is None: take the "
        "inputs from Model.read"
      )
    if inputs.embedded.shape[1] != T + N - 1:
      raise ValueError(
        f"{kind} heads read {T + N - 1} tokens over z {inputs.z.shape}, but "
        f"embedded is {inputs.embedded.shape}"
      )
  if scale.shape != (N,):
    raise ValueError(f"scale {scale.shape} does not fit {N} heads")
  if B % shards:
    raise ValueError(f"batch {B} is not divisible by {shards} shards")
