"""The loss of a batch: its targets, then trunk and heads."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.data import batch as batch_lib
from mtp_jax.loss import cross_entropy, implementations
from mtp_jax.model import attention, model
from mtp_jax.model import heads as heads_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a loss is computed.

  Only `detach` changes the result beyond rounding, and that the gradient alone.

  Attributes:
    implementation: a key of IMPLEMENTATIONS.
    block, shards: see `serial`.
    rows: on a mesh, the sharding of the batch axis. XLA would otherwise split
      z's width as FSDP splits the parameters', and sum every block's logits
      over all devices.
    kernel: of the attention, see `layers.training_context`.
    detach: heads from this one on (from 1) send no gradient into the trunk;
      0: all do.
  """

  implementation: str = "serial"
  block: int = 256
  shards: int = 1
  rows: jax.sharding.NamedSharding | None = None
  kernel: attention.Kernel = attention.xla
  detach: int = 0


def future_targets(
  batch: batch_lib.Batch, n_future: int, offsets: tuple[int, ...] = ()
) -> cross_entropy.Targets:
  """Targets of every head: row i holds token t+1+i, or -1, and its weight.

  Args:
    batch: windows of T+N tokens; with `offsets`, of T + the last of them.
    n_future: N.
    offsets: how many tokens ahead each head predicts (`config.Model.offsets`),
      in place of 1 to N.

  Returns:
    tokens [N, B, T] int32, -1 where t and its target are not in the same
    document; weight [N, B, T] float32.

  Raises:
    ValueError: windows too short for N, or arrays of different shapes.
  """
  tokens, segments, weight = batch.tokens, batch.segments, batch.weight
  distances = offsets or range(1, n_future + 1)
  T = tokens.shape[1] - distances[-1]
  if T < 1:
    raise ValueError(
      f"windows of {tokens.shape[1]} tokens hold no position for "
      f"{distances[-1]} future tokens"
    )
  for name in ("segments", "weight"):
    shape = getattr(batch, name).shape
    if shape != tokens.shape:
      raise ValueError(f"{name} {shape}, but tokens {tokens.shape}")
  here = segments[:, :T]

  def one(distance):
    there = slice(distance, distance + T)
    inside = (segments[:, there] == here) & (here > 0)
    return jnp.where(inside, tokens[:, there], -1), weight[:, there]

  rows = zip(*map(one, distances), strict=True)
  return cross_entropy.Targets(*map(jnp.stack, rows))


def token_loss(
  net: model.Model,
  batch: batch_lib.Batch,
  targets: cross_entropy.Targets,
  scale: jax.Array,
  settings: Settings = Settings(),
) -> tuple[jax.Array, jax.Array]:
  """Trunk and loss of a batch.

  Args:
    net: the model.
    batch: windows of T+reach tokens.
    targets: of the batch, from `future_targets`.
    scale: [N], such as each head's weight over `targets.weight_sums()[0]`.
    settings: how it is computed.

  Returns:
    (total, nll [N]) as of `serial`.

  Raises:
    ValueError: no such implementation, or shapes that do not fit each other.
  """
  inputs = _read(net, batch, settings)
  return _heads_loss(net.heads, inputs, targets, scale, settings)


def frozen_loss(
  own: heads_lib.Own,
  net: model.Model,
  batch: batch_lib.Batch,
  targets: cross_entropy.Targets,
  scale: jax.Array,
  settings: Settings = Settings(),
) -> tuple[jax.Array, jax.Array]:
  """`token_loss` of a model whose heads 2..N are `own`, to train these alone.

  Equals `token_loss(surgery.join(net, own), ...)`. A gradient with respect to
  `own` costs less: trunk and head 1 run forward only, and no gradient of z or
  of shared parameters is computed once `jax.jit` has dropped what nobody uses.
  With `batch.z` the trunk does not run at all.

  Args:
    own: heads 2..N, from `surgery.trainable`.
    net: the rest of the model.
    batch, targets, scale, settings: as of `token_loss`.

  Returns:
    (total, nll [N]) as of `serial`, of all heads.

  Example, a gradient on kept outputs of the trunk:
    >>> import dataclasses
    >>> from mtp_jax import config
    >>> from mtp_jax.model import surgery
    >>> cfg = config.Model(vocab=7, width=8, mlp=12, layers=3, n_future=2)
    >>> net = model.Model(cfg, jax.random.key(0))
    >>> windows = batch_lib.of(jnp.arange(12).reshape(2, 6) % 7)
    >>> z = net.read(windows.tokens, windows.segments).z
    >>> windows = dataclasses.replace(windows, z=z)
    >>> targets = future_targets(windows, 2)
    >>> scale = 1 / targets.weight_sums()
    >>> gradient = jax.jit(jax.grad(frozen_loss, has_aux=True))
    >>> d_own, nll = gradient(
    ...   surgery.trainable(net), net, windows, targets, scale
    ... )
    >>> d_own.layers.w_up.shape, nll.shape
    ((1, 8, 12), (2,))
  """
  heads, inputs = net.heads, _read(net, batch, settings)
  first, rest = heads.with_own(heads.own(slice(1))), heads.with_own(own)
  of_first, of_rest = inputs, inputs
  if inputs.embedded is not None:  # head i reads token t+i-1
    T, embedded = inputs.z.shape[1], inputs.embedded
    of_first = inputs._replace(embedded=embedded[:, :T])
    of_rest = inputs._replace(embedded=embedded[:, 1:])
  if heads.order is not None:  # head 2 reads head 1
    state = first.run(
      first.layer(0), inputs.z, inputs.ctx, *first.tokens_read(of_first, 0)
    )
    of_rest = of_rest._replace(z=state)

  def part(heads, inputs, rows):
    here = jax.tree.map(lambda a: a[rows], (targets, scale))
    return _heads_loss(heads, inputs, *here, settings)

  total_1, nll_1 = part(first, of_first, slice(1))
  total, nll = part(rest, of_rest, slice(1, None))
  return total_1 + total, jnp.concatenate([nll_1, nll])


def _read(net, batch, settings):
  """What the heads read of a batch, split by rows on a mesh."""
  name = settings.implementation
  if name not in implementations.IMPLEMENTATIONS:
    known = ", ".join(implementations.IMPLEMENTATIONS)
    raise ValueError(f"no loss {name!r}; choose one of {known}")
  inputs = net.read(
    batch.tokens, batch.segments, kernel=settings.kernel, z=batch.z
  )
  if settings.detach:
    if net.heads.order is not None:
      raise ValueError(
        f"detach={settings.detach} with {net.cfg.head} heads, which read each "
        "other: choose a kind of head that reads the trunk alone"
      )
    sends = jnp.arange(1, net.cfg.n_future + 1) < settings.detach
    inputs = inputs._replace(sends=sends)
  if settings.rows is None:
    return inputs
  z, embedded = jax.lax.with_sharding_constraint(
    (inputs.z, inputs.embedded), settings.rows
  )
  return inputs._replace(z=z, embedded=embedded)


def _heads_loss(heads, inputs, targets, scale, settings):
  call = implementations.IMPLEMENTATIONS[settings.implementation]
  with jax.named_scope("heads"):
    return call(
      heads,
      inputs,
      targets,
      scale,
      block=settings.block,
      shards=settings.shards,
    )
