"""Batches of packed tokens: a pure function of (seed, index, shard).

Window w of length T holds the tokens [w T, w T + T + reach). Those after the
first T are also the first of the next window, so that every head has a target
at every position. grain shuffles the windows differently in each epoch.

A batch's index is the number of batches consumed before it, which is the `step`
of a training state: step s of the loop, counted from 1, takes batch s-1. A run
resumes from its step alone, with any number of processes.
"""

import dataclasses
import multiprocessing
import sys
from collections.abc import Iterator

import grain
from absl import flags

from mtp_jax.data import batch as batch_lib
from mtp_jax.data import pack as _pack
from mtp_jax.data import packed as packed_lib

Packed, pack = packed_lib.Packed, _pack.pack

_UNGUARDED = (
  "A script that sets data.workers above 0 must do its work under "
  "if __name__ == '__main__': because every worker process imports the script"
)


@dataclasses.dataclass(frozen=True)
class Batching:
  """How the windows of a split form batches, and which rows are read here.

  Attributes:
    batch: B, rows of the global batch.
    seq_len: T.
    reach: tokens after each window, which the furthest head's targets need: N,
      or the last of `model.offsets` (`config.Model.reach`).
    seed: seed of the shuffle.
    shard: index of the block of B / shards rows to read.
    shards: number of blocks; together, in order, they are the global batch.
  """

  batch: int
  seq_len: int
  reach: int
  seed: int
  shard: int = 0
  shards: int = 1


def batches(
  packed: Packed, batching: Batching, *, workers: int = 0, start: int = 0
) -> Iterator[batch_lib.Batch]:
  """Yields batches start, start + 1, ... without end.

  They equal `batch_at(packed, index, batching)`, and are prefetched by threads
  or by worker processes. No earlier batch is read to reach `start`.

  Args:
    packed: the split.
    batching: sizes, seed and shard.
    workers: number of worker processes that prefetch; 0: threads do.
    start: index of the first batch: the batches consumed before.

  Returns:
    Iterator of batches of B / shards rows.

  Raises:
    ValueError: batch is not divisible by shards, or there is no data.
    ChildProcessError: by the iterator, if a worker process has ended.
    blocks.CacheDamaged: by the iterator, instead of the first batch whose
      tokens have changed on the disk.

  Example:
    >>> import numpy as np
    >>> from mtp_jax.data import packed, pipeline
    >>> split = packed.Packed(
    ...   tokens=np.array([256, 72, 105, 257, 256, 89, 111, 117, 257]),
    ...   starts=np.array([0, 4]), bytes_per_token=1.0, fingerprint="",
    ...   documents=2, skipped={},
    ... )
    >>> batching = pipeline.Batching(batch=2, seq_len=4, reach=2, seed=0)
    >>> batch = next(pipeline.batches(split, batching, start=10))
    >>> batch.tokens.shape
    (2, 6)
    >>> again = pipeline.batch_at(split, 10, batching)
    >>> np.array_equal(batch.tokens, again.tokens)
    True
  """
  every = _stream(packed, batching)
  ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  stream = every[start:].to_iter_dataset(ahead)
  if workers:
    refuse_in_worker()
    if not flags.FLAGS.is_parsed():  # in a notebook; grain reads absl flags
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    )
    return _from_workers(iter(stream), workers)
  return iter(stream)


def refuse_in_worker() -> None:
  """Exits if this process is a worker that runs its parent's script again.

  A worker process imports the script that started it. If the script does not
  guard its work by `if __name__ == "__main__":`, the worker would repeat it.
  """
  # multiprocessing sets this while a new process imports the script.
  if getattr(multiprocessing.current_process(), "_inheriting", False):
    sys.exit(_UNGUARDED)


def _from_workers(stream, workers: int) -> Iterator[batch_lib.Batch]:
  try:
    yield from stream
  except RuntimeError as error:
    if "process was terminated" not in str(error):
      raise
    line = str(error).split(". ")[0]
    hint = f"Its own lines above say why. {_UNGUARDED}"
    if "exit code -" in line:  # a signal's number
      hint = (
        "The system kills processes when memory runs out: lower data.workers"
      )
    raise ChildProcessError(f"data.workers={workers}: {line}. {hint}") from None


def batch_at(packed: Packed, index: int, batching: Batching) -> batch_lib.Batch:
  """Batch `index`, from 0; other arguments and result as of `batches`."""
  return _stream(packed, batching)[index]


def _stream(packed: Packed, batching: Batching) -> grain.MapDataset:
  """A dataset whose item s is one shard of batch s.

  The shuffled windows are divided into blocks of B / shards rows. The blocks
  of one batch are consecutive, so a shard is every `shards`-th block.
  """
  batch, shard, shards = batching.batch, batching.shard, batching.shards
  if batch % shards:
    raise ValueError(f"batch {batch} is not divisible by {shards} shards")
  if not 0 <= shard < shards:
    raise ValueError(f"shard {shard} is not one of {shards}")
  windows = _Windows(packed, batching.seq_len, batching.reach)
  if not len(windows):
    raise ValueError("the split holds no token, so no window")
  shuffled = grain.MapDataset.source(windows).seed(batching.seed).shuffle()
  # Not repeat(None), whose length is sys.maxsize: grain divides the length by
  # the rows in floating point, and with one row len() refuses the result.
  epochs = sys.maxsize // len(windows) // 2
  blocks = shuffled.repeat(epochs).batch(batch // shards)
  return blocks[shard::shards]


class _Windows:
  """A split as a random-access source of grain."""

  def __init__(self, packed: Packed, seq_len: int, reach: int):
    self._packed, self._shape = packed, (seq_len, reach)

  def __len__(self) -> int:
    return self._packed.windows(self._shape[0])

  def __getitem__(self, index: int) -> batch_lib.Batch:
    return self._packed.window(index, *self._shape)
