"""Rows of whole documents, for tasks whose documents are short.

A window of `packed` may cut a document. Here none is cut: a row takes the next
document while it has room, and its end is empty.
"""

import numpy as np

from mtp_jax.data import batch


def whole(
  tokens: np.ndarray,
  lengths: np.ndarray,
  weight: np.ndarray | None = None,
  *,
  seq_len: int,
  reach: int,
) -> batch.Batch:
  """Places documents, in order, in as many rows as they need.

  Args:
    tokens: [documents, L] ids; those of document i are the first lengths[i].
    lengths: [documents] tokens of each, from 1 to T.
    weight: [documents, L] of each token in the loss; None: 1.
    seq_len: T.
    reach: tokens of no document at the end of each row, see
      `pipeline.Batching`.

  Returns:
    A Batch of rows [R, T + reach] on the host, in the dtypes of a step's batch.

  Raises:
    ValueError: a document is empty or longer than T; names the first.

  Example:
    >>> import numpy as np
    >>> from mtp_jax.data import rows
    >>> tokens = np.array([[5, 6, 0], [7, 8, 9], [4, 0, 0]])
    >>> rows.whole(tokens, np.array([2, 3, 1]), seq_len=4, reach=1).tokens
    array([[5, 6, 0, 0, 0],
           [7, 8, 9, 4, 0]], dtype=int32)
  """
  wrong = np.flatnonzero((lengths < 1) | (lengths > seq_len))
  if len(wrong):
    raise ValueError(
      f"document {wrong[0]} has {lengths[wrong[0]]} tokens; a row takes from 1 "
      f"to seq_len {seq_len}"
    )
  places, numbers, row, used, number = [], [], 0, 0, 0
  for length in lengths.tolist():
    if used + length > seq_len:
      row, used, number = row + 1, 0, 0
    number += 1
    places.append(row * (seq_len + reach) + used)
    numbers.append(number)
    used += length
  inside = np.arange(tokens.shape[1]) < lengths[:, None]
  there = (np.array(places)[:, None] + np.arange(tokens.shape[1]))[inside]
  shape = (row + 1, seq_len + reach)

  def spread(values, dtype):
    found = np.zeros(shape, dtype)
    found.flat[there] = np.broadcast_to(values, inside.shape)[inside]
    return found

  return batch.Batch(
    tokens=spread(tokens, np.int32),
    segments=spread(np.array(numbers)[:, None], np.int32),
    weight=spread(1.0 if weight is None else weight, np.float32),
  )
