"""From lists of ids to a checked, padded array."""

from collections.abc import Sequence

import numpy as np


def pad(
  prompts: Sequence[Sequence[int]],
  vocab: int,
  *,
  cache_len: int | None = None,
  reserve: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right with zeros, which no row ever looks at.

  The width is rounded up to a power of two, at least 16, where the cache has
  the room, so that prompts of many lengths compile only a few programs.

  Args:
    prompts: sequences of ids.
    vocab: V.
    cache_len: positions of the cache, if they are bounded.
    reserve: positions of it that the prompts may not use.

  Returns:
    tokens [B, P] int32, lengths [B] int32.

  Raises:
    ValueError: no prompts, an empty one, one too long for the cache, or an id
      outside 0..V-1 (JAX would clamp both silently); names the prompt.
  """
  if not len(prompts):
    raise ValueError("no prompts")
  rows = [_check(i, p, vocab) for i, p in enumerate(prompts)]
  longest = max(row.size for row in rows)
  padded = width(longest)
  if cache_len is not None:
    for i, row in enumerate(rows):
      if row.size + reserve > cache_len:
        raise ValueError(
          f"prompt {i} has {row.size} tokens; with {reserve} positions kept "
          f"for new ones it does not fit into a cache of {cache_len}"
        )
    padded = min(padded, cache_len - reserve)
  tokens = np.zeros((len(rows), padded), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : row.size] = row
  return tokens, np.array([row.size for row in rows], np.int32)


def width(longest: int) -> int:
  """Width P to which prompts of up to `longest` tokens are padded."""
  return max(16, 1 << (longest - 1).bit_length())


def _check(i: int, prompt: Sequence[int], vocab: int) -> np.ndarray:
  row = np.asarray(prompt)
  if row.ndim != 1:
    raise ValueError(f"prompt {i} is {prompt!r}, not a sequence of token ids")
  if not row.size:
    raise ValueError(
      f"prompt {i} is empty; give at least one token, such as the "
      "tokenizer's bos"
    )
  if not np.issubdtype(row.dtype, np.integer):
    raise ValueError(f"prompt {i} holds {row.dtype}, not token ids")
  bad = row[(row < 0) | (row >= vocab)]
  if bad.size:
    raise ValueError(
      f"prompt {i} holds id {bad[0]}, outside the vocabulary 0..{vocab - 1}"
    )
  return row
