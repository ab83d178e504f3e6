"""The loss of a batch: its targets, then trunk and heads."""

import jax
import jax.numpy as jnp

from mtp_jax.loss import heads as head_losses
from mtp_jax.model import attention, layers, model


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

  Raises:
    ValueError: windows too short for N, or segments of another shape.
  """
  T = tokens.shape[1] - n_future
  if T < 1:
    raise ValueError(
      f"windows of {tokens.shape[1]} tokens hold no position for {n_future} "
      "future tokens"
    )
  if segments.shape != tokens.shape:
    raise ValueError(f"segments {segments.shape}, but tokens {tokens.shape}")
  here = segments[:, :T]

  def one(i):
    there = slice(1 + i, 1 + i + T)
    inside = (segments[:, there] == here) & (here > 0)
    return jnp.where(inside, tokens[:, there], -1)

  return jnp.stack([one(i) for i in range(n_future)])


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
  rows: jax.sharding.NamedSharding | None = None,
  kernel: attention.Kernel = attention.xla,
) -> tuple[jax.Array, jax.Array]:
  """Trunk and loss of a batch.

  Args:
    net: the model.
    tokens: [B, T] int32.
    segments: [B, T] int32 document numbers.
    targets: [N, B, T] from `future_targets`.
    scale: [N], e.g. weights / number of targets.
    loss: a key of head_losses.IMPLEMENTATIONS.
    block, shards: see `serial`.
    rows: on a mesh, the sharding of z's batch axis. XLA would otherwise split
      z's width as FSDP splits the parameters', and sum every block's logits
      over all devices.
    kernel: of the attention, see `layers.training_context`.

  Returns:
    (scaled total, summed nats per head [N]).

  Raises:
    ValueError: no such loss, or shapes that do not fit each other.
  """
  if loss not in head_losses.IMPLEMENTATIONS:
    known = ", ".join(head_losses.IMPLEMENTATIONS)
    raise ValueError(f"no loss {loss!r}; choose one of {known}")
  ctx = layers.training_context(segments, net.cfg, kernel)
  z = net.run_trunk(tokens, ctx)
  if rows is not None:
    z = jax.lax.with_sharding_constraint(z, rows)
  call = head_losses.IMPLEMENTATIONS[loss]
  with jax.named_scope("heads"):
    return call(net.heads, z, ctx, targets, scale, block=block, shards=shards)
