"""Packed tokens to batches: a pure function of (seed, step, process).

Window w of length T holds tokens [w T, w T + T + N): the N after its end are
the first of the next window too, so that no head loses a target at the tail.
grain shuffles the windows anew for every epoch. Nothing but the step needs to
be saved for a run to go on, on any number of processes.
"""

import sys
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from mtp_jax.data import pack as _pack

Packed, pack = _pack.Packed, _pack.pack
CacheDamaged = _pack.CacheDamaged


def batches(
  packed: Packed,
  *,
  batch: int,
  seq_len: int,
  n_future: int,
  seed: int,
  process: int = 0,
  processes: int = 1,
  workers: int = 0,
  start: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """The batches of steps start, start + 1, ... without end.

  Equals `batch_at(packed, step, ...)` for those steps, read ahead by threads
  or by worker processes. Getting to `start` costs nothing.

  Args:
    packed: the split.
    batch: B, rows of the global batch.
    seq_len: T.
    n_future: N.
    seed: of the shuffle.
    process: which block of B / processes rows to give.
    processes: number of them; their blocks in order are the global batch.
    workers: prefetching processes; 0 reads ahead in threads.
    start: first step.

  Returns:
    Iterator of tokens and segments, each [B / processes, T+N], int32.

  Raises:
    ValueError: batch is not divisible by processes, or there is no data.
    CacheDamaged: from the iterator, in place of the first batch whose tokens
      have changed on the disk; all batches before it are sound.
  """
  steps = _stream(packed, batch, seq_len, n_future, seed, process, processes)
  ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  stream = steps[start:].to_iter_dataset(ahead)
  if workers:
    if not flags.FLAGS.is_parsed():  # a notebook; grain reads its flags
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    )
  return iter(stream)


def batch_at(
  packed: Packed,
  step: int,
  *,
  batch: int,
  seq_len: int,
  n_future: int,
  seed: int,
  process: int = 0,
  processes: int = 1,
) -> dict[str, np.ndarray]:
  """The batch of one step; arguments and result as in `batches`."""
  steps = _stream(packed, batch, seq_len, n_future, seed, process, processes)
  return steps[step]


def _stream(
  packed, batch, seq_len, n_future, seed, process, processes
) -> grain.MapDataset:
  """Item s is the batch of step s.

  Batches of B / processes rows of the shuffled stream: every `processes`-th
  of them is this process's block, since the blocks of a step follow each
  other.
  """
  if batch % processes:
    raise ValueError(f"batch {batch} is not divisible by {processes} processes")
  if not 0 <= process < processes:
    raise ValueError(f"process {process} is not one of {processes}")
  windows = _Windows(packed, seq_len, n_future)
  if not len(windows):
    raise ValueError("the split holds no token, so no window")
  shuffled = grain.MapDataset.source(windows).seed(seed).shuffle()
  # Not repeat(None): as long as an int can say, it cannot be cut into ones.
  epochs = sys.maxsize // len(windows) // 2
  blocks = shuffled.repeat(epochs).batch(batch // processes)
  return blocks[process::processes]


class _Windows:
  """A split as the random-access source that grain wants."""

  def __init__(self, packed: Packed, seq_len: int, n_future: int):
    self._packed, self._shape = packed, (seq_len, n_future)

  def __len__(self) -> int:
    return self._packed.windows(self._shape[0])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    tokens, segments = self._packed.window(index, *self._shape)
    return {"tokens": tokens, "segments": segments}
