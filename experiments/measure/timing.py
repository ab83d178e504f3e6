"""Times calls, which alternate; results are medians."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

K = TypeVar("K", bound=Hashable)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds of a call until its arrays are there, and its result."""
  begin = time.perf_counter()
  result = jax.block_until_ready(call())
  return time.perf_counter() - begin, result


def median(call: Callable[[], Any], repeats: int = 9) -> float:
  """Median seconds of `repeats` calls, after one that compiles."""
  jax.block_until_ready(call())
  return statistics.median(timed(call)[0] for _ in range(repeats))


def alternate(
  calls: Mapping[K, Callable[[], Any]], rounds: int
) -> dict[K, list[Any]]:
  """What each call returns in each round; every round calls all in turn.

  Whatever else the machine does for longer than a round then slows all of
  them, and the ratios within a round hold.
  """
  found = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      found[name].append(call())
  return found


def seconds_in_turns(
  calls: Mapping[K, Callable[[], Any]], rounds: int
) -> dict[K, list[float]]:
  """Seconds of each call in each round; results are dropped."""

  def seconds(call):
    return lambda: timed(call)[0]

  return alternate({k: seconds(call) for k, call in calls.items()}, rounds)


def spread(seconds: Sequence[float]) -> dict[str, float]:
  """Median, least and most of some times, by the names that results use."""
  return {
    "seconds": statistics.median(seconds),
    "least_seconds": min(seconds),
    "most_seconds": max(seconds),
  }


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
  """Median over rounds of a time over the other one of its round."""
  return statistics.median(a / b for a, b in zip(times, others, strict=True))
