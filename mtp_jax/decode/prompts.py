"""From lists of ids to a checked, padded array."""

from collections.abc import Sequence

import numpy as np


def pad(
  prompts: Sequence[Sequence[int]], vocab: int, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right with zeros, which no row ever looks at.

  The width is rounded up to a power of two (at least 16, at most `limit`), so
  that prompts of many lengths compile only a few programs.

  Args:
    prompts: sequences of ids.
    vocab: V.
    limit: longest prompt that fits, if there is a bound.

  Returns:
    tokens [B, P] int32, lengths [B] int32.

  Raises:
    ValueError: no prompts, an empty one, one longer than `limit`, or an id
      outside 0..V-1 (JAX would clamp it silently); names the prompt.
  """
  rows = [np.asarray(p) for p in prompts]
  if not rows:
    raise ValueError("no prompts")
  for i, row in enumerate(rows):
    if row.ndim != 1 or row.size == 0:
      raise ValueError(
        f"prompt {i} has shape {row.shape}; give at least one token, such as "
        "the tokenizer's bos"
      )
    if not np.issubdtype(row.dtype, np.integer):
      raise ValueError(f"prompt {i} holds {row.dtype}, not token ids")
    bad = row[(row < 0) | (row >= vocab)]
    if bad.size:
      raise ValueError(
        f"prompt {i} holds id {bad[0]}, outside the vocabulary 0..{vocab - 1}"
      )
    if limit is not None and row.size > limit:
      raise ValueError(
        f"prompt {i} has {row.size} tokens, but the cache holds {limit}"
      )
  longest = max(row.size for row in rows)
  width = max(16, 1 << (longest - 1).bit_length())
  width = width if limit is None else max(longest, min(width, limit))
  tokens = np.zeros((len(rows), width), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : row.size] = row
  return tokens, np.array([row.size for row in rows], np.int32)
