"""What a step trains on: windows of packed text."""

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """B windows of T positions, with the `reach` tokens after the end of each.

  `reach` is N, or the last of `model.offsets` where they are set
  (`config.Model.reach`). A single window has no axis B.

  Attributes:
    tokens: [B, T+reach] int32.
    segments: [B, T+reach] int32: the number of each token's document, 0 for
      none.
    weight: [B, T+reach] float32, not negative: of each token in the loss of
      the heads that predict it. A token of weight 0 is read, but not learnt.
    z: [B, T, D] trunk output of these windows, kept from an earlier pass; None:
      the trunk runs. Only with a frozen trunk (`train.freeze`).
  """

  tokens: jax.Array | np.ndarray
  segments: jax.Array | np.ndarray
  weight: jax.Array | np.ndarray
  z: jax.Array | np.ndarray | None = None


def of(
  tokens: jax.Array | np.ndarray,
  segments: jax.Array | np.ndarray | None = None,
  weight: jax.Array | np.ndarray | None = None,
) -> Batch:
  """A Batch of tokens [B, T+reach].

  By default a row is one document, and every token has weight 1.
  """
  if segments is None:
    segments = np.ones(tokens.shape, np.int32)
  if weight is None:
    weight = np.ones(tokens.shape, np.float32)
  return Batch(tokens, segments, weight)


def abstract(
  rows: int, length: int, sharding: jax.sharding.Sharding | None = None
) -> Batch:
  """Shapes and dtypes of a Batch of `rows` windows of `length` = T+reach."""

  def array(dtype):
    return jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)

  return Batch(array(np.int32), array(np.int32), array(np.float32))
