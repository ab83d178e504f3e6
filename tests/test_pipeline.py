"""Batches: one order for any number of processes and workers."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.data import pipeline
from tests import test_pack
from tests.test_packed import in_memory

BATCHING, data, equal = test_pack.BATCHING, test_pack.data, test_pack.equal


STEPS = np.random.default_rng(0).integers(0, 10_000, 3).tolist()


def part(shard, shards):
  return dataclasses.replace(BATCHING, shard=shard, shards=shards)


@pytest.fixture
def packed(data):
  return pipeline.pack(data, tokenizer.Bytes())[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("step", STEPS)
def test_global_batch_is_the_same_for_any_number_of_processes(
  packed, processes, step
):
  whole = pipeline.batch_at(packed, step, BATCHING)
  assert whole.tokens.shape == (12, 10)
  rows = [
    next(pipeline.batches(packed, part(p, processes), start=step))
    for p in range(processes)
  ]
  equal(jax.tree.map(lambda *parts: np.concatenate(parts), *rows), whole)


# A worker process takes two seconds to start.
@pytest.mark.slow
@pytest.mark.parametrize(
  "workers, starts", [(0, STEPS), (1, STEPS[:1]), (2, STEPS[1:2])]
)
def test_batches_are_the_same_for_any_number_of_workers(
  packed, workers, starts
):
  second = part(1, 2)
  for start in starts:
    stream = pipeline.batches(packed, second, workers=workers, start=start)
    for step in range(start, start + 5):
      wanted = pipeline.batch_at(packed, step, second)
      equal(next(stream), wanted)


UNGUARDED = """
import numpy as np
from mtp_jax.data import pipeline

packed = pipeline.Packed(np.arange(99), np.array([0]), 1.0, "", 1, {})
batching = pipeline.Batching(batch=1, seq_len=7, reach=1, seed=0)
next(pipeline.batches(packed, batching, workers=1))
"""


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
  (tmp_path / "script.py").write_text(UNGUARDED)
  done = subprocess.run(
    [sys.executable, str(tmp_path / "script.py")],
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert done.returncode == 1
  guard = "must do its work under if __name__ == '__main__': because every"
  worker, *_, error = done.stderr.strip().splitlines()
  assert (
    worker.startswith("A script that sets data.workers") and guard in worker
  )
  assert error.startswith("ChildProcessError: ") and guard in error
  assert done.stderr.count("Traceback") == 1  # the script's own


def test_an_epoch_gives_every_window_once_in_an_order_of_its_own(packed):
  count = packed.windows(7)
  rows = []
  for batch in pipeline.batches(packed, BATCHING):
    pairs = zip(batch.tokens, batch.segments, strict=True)
    rows += [(t.tobytes(), s.tobytes()) for t, s in pairs]
    if len(rows) >= 2 * count:
      break
  windows = [packed.window(w, 7, 3) for w in range(count)]
  wanted = sorted((w.tokens.tobytes(), w.segments.tobytes()) for w in windows)
  first, second = rows[:count], rows[count : 2 * count]
  assert sorted(first) == sorted(second) == wanted
  assert first != second
  other = pipeline.batch_at(packed, 0, dataclasses.replace(BATCHING, seed=6))
  assert (other.tokens != pipeline.batch_at(packed, 0, BATCHING).tokens).any()


def test_no_window_is_lost_or_read_twice_as_processes_come_and_go(packed):
  """An epoch on 2 processes, then 3, 1 and 4: each window once."""
  count = packed.windows(7)
  stages = np.resize([2, 3, 1, 4], -(-count // 12))
  assert len(set(stages)) == 4
  stages.sort()  # 1, 2, 3, 4 processes for some steps each
  rows = []
  for step, processes in enumerate(stages.tolist()):
    for process in range(processes):
      found = pipeline.batch_at(packed, step, part(process, processes))
      rows += [t.tobytes() for t in found.tokens]
  wanted = sorted(packed.window(w, 7, 3).tokens.tobytes() for w in range(count))
  assert sorted(rows[:count]) == wanted


def test_a_split_smaller_than_a_batch_repeats():
  batch = pipeline.batch_at(in_memory([3]), 2, BATCHING)
  assert (batch.tokens[:, :3] == [0, 1, 2]).all()


def test_batches_of_one_row(packed):
  shape = dict(seq_len=7, reach=2, seed=5)
  two = pipeline.batch_at(packed, 3, pipeline.Batching(batch=2, **shape))
  alone = pipeline.Batching(batch=1, **shape)
  for row in range(2):
    one = pipeline.batch_at(packed, 6 + row, alone)
    equal(one, jax.tree.map(lambda x, row=row: x[row : row + 1], two))


def test_step_one_million_is_reached_at_once(packed, capsys):
  begin = time.perf_counter()
  batch = next(pipeline.batches(packed, BATCHING, start=10**6))
  seconds = time.perf_counter() - begin
  with capsys.disabled():
    print(f"\nstep 10**6 reached in {seconds * 1e3:.1f} ms")
  equal(batch, pipeline.batch_at(packed, 10**6, BATCHING))
  assert seconds < 5  # 0.2 is promised; the rest is a busy machine's


def test_batches_that_cannot_be_are_refused_with_their_numbers(packed):
  with pytest.raises(ValueError, match="batch 12 is not divisible by 5"):
    pipeline.batches(packed, part(0, 5))
  with pytest.raises(ValueError, match="shard 2 is not one of 2"):
    pipeline.batches(packed, part(2, 2))
  with pytest.raises(ValueError, match="no window"):
    pipeline.batches(in_memory([0]), BATCHING)
