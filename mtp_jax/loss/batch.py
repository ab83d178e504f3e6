"""The loss of a batch: its targets, then trunk and heads."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.data import batch as batch_lib
from mtp_jax.loss import cross_entropy
from mtp_jax.loss import heads as head_losses
from mtp_jax.model import attention, model


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a loss is computed. None of it changes the result beyond rounding.

  Attributes:
    implementation: a key of IMPLEMENTATIONS.
    block, shards: see `serial`.
    rows: on a mesh, the sharding of the batch axis. XLA would otherwise split
      z's width as FSDP splits the parameters', and sum every block's logits
      over all devices.
    kernel: of the attention, see `layers.training_context`.
  """

  implementation: str = "serial"
  block: int = 256
  shards: int = 1
  rows: jax.sharding.NamedSharding | None = None
  kernel: attention.Kernel = attention.xla


def future_targets(
  batch: batch_lib.Batch, n_future: int
) -> cross_entropy.Targets:
  """Targets of every head: row i holds token t+1+i, or -1, and its weight.

  Args:
    batch: windows of T+N tokens.
    n_future: N.

  Returns:
    tokens [N, B, T] int32, -1 where t and t+1+i are not in the same document;
    weight [N, B, T] float32.

  Raises:
    ValueError: windows too short for N, or arrays of different shapes.
  """
  tokens, segments, weight = batch.tokens, batch.segments, batch.weight
  T = tokens.shape[1] - n_future
  if T < 1:
    raise ValueError(
      f"windows of {tokens.shape[1]} tokens hold no position for {n_future} "
      "future tokens"
    )
  for name in ("segments", "weight"):
    shape = getattr(batch, name).shape
    if shape != tokens.shape:
      raise ValueError(f"{name} {shape}, but tokens {tokens.shape}")
  here = segments[:, :T]

  def one(i):
    there = slice(1 + i, 1 + i + T)
    inside = (segments[:, there] == here) & (here > 0)
    return jnp.where(inside, tokens[:, there], -1), weight[:, there]

  rows = zip(*(one(i) for i in range(n_future)), strict=True)
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
    batch: windows of T+N tokens.
    targets: of the batch, from `future_targets`.
    scale: [N], such as each head's weight over `targets.weights()[0]`.
    settings: how it is computed.

  Returns:
    (total, nll [N]) as of `serial`.

  Raises:
    ValueError: no such implementation, or shapes that do not fit each other.
  """
  name, rows = settings.implementation, settings.rows
  if name not in head_losses.IMPLEMENTATIONS:
    known = ", ".join(head_losses.IMPLEMENTATIONS)
    raise ValueError(f"no loss {name!r}; choose one of {known}")
  inputs = net.read(batch.tokens, batch.segments, kernel=settings.kernel)
  if rows is not None:
    z, embedded = jax.lax.with_sharding_constraint(
      (inputs.z, inputs.embedded), rows
    )
    inputs = inputs._replace(z=z, embedded=embedded)
  call = head_losses.IMPLEMENTATIONS[name]
  with jax.named_scope("heads"):
    return call(
      net.heads,
      inputs,
      targets,
      scale,
      block=settings.block,
      shards=settings.shards,
    )
