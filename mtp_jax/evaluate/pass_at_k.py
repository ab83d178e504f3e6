"""pass@k: how likely one of k samples solves a problem.

With n samples of a problem, c of them correct, the estimate without bias is
1 - C(n-c, k) / C(n, k): the share of all choices of k samples that hold a
correct one. The table has its mean over problems for each temperature, and for
the best temperature of each k (the paper's oracle), with intervals from
problems drawn again with replacement.

Reference: Chen et al. 2021 (arXiv 2107.03374), section 2.1; the paper, table 1
and table S12, and 90 % intervals as in figure 3.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
  """A mean over problems, and its interval."""

  mean: float
  low: float
  high: float
  temperature: float  # of the oracle: the one that was chosen


def pass_at_k(
  n: int, correct: Sequence[int] | np.ndarray, k: int
) -> np.ndarray:
  """The estimate for each problem [P], float64.

  Example:
    >>> pass_at_k(3, [0, 1, 3], 2).round(4).tolist()
    [0.0, 0.6667, 1.0]

  Args:
    n: samples of each problem.
    correct: [P] how many of them were correct.
    k: from 1 to n.

  Raises:
    ValueError: k is not in 1..n, or a count is not in 0..n.
  """
  correct = np.asarray(correct, np.int64)
  if not 1 <= k <= n:
    raise ValueError(f"k={k} is not in 1..{n}, the samples of a problem")
  outside = correct[(correct < 0) | (correct > n)]
  if outside.size:
    raise ValueError(f"{outside[0]} correct samples of {n}")
  # The ratio of binomials, factor by factor; one is 0 where n - c < k.
  places = np.arange(k)
  factors = (n - correct[:, None] - places) / (n - places)
  return 1 - factors.clip(min=0).prod(1)


def count(
  names: Sequence[str], verdicts: Iterable[Mapping[str, Any]]
) -> dict[float, list[int]]:
  """Correct samples of each problem [P], by temperature in ascending order.

  Args:
    names: of the problems.
    verdicts: of their samples, each with task_id (a name), temperature and
      passed, as `mtp_jax.tasks.judging.judge` returns them.

  Raises:
    ValueError: a problem has no verdict at a temperature.
  """
  verdicts = list(verdicts)
  judged = {(v["temperature"], v["task_id"]) for v in verdicts}
  for temperature in sorted({temperature for temperature, _ in judged}):
    for name in names:
      if (temperature, name) not in judged:
        raise ValueError(f"{name} has no verdict at temperature {temperature}")
  passed = collections.Counter(
    (v["temperature"], v["task_id"]) for v in verdicts if v["passed"]
  )
  return {
    temperature: [passed[temperature, name] for name in names]
    for temperature in sorted({v["temperature"] for v in verdicts})
  }


def table(
  n: int,
  correct: Mapping[float, Sequence[int]],
  ks: Sequence[int],
  *,
  draws: int = 1000,
  level: float = 0.9,
  seed: int = 0,
) -> dict[str, dict[int, Estimate]]:
  """pass@k by temperature, and of the oracle over temperatures.

  The oracle takes, for each k, the temperature with the highest mean. Its
  interval chooses anew in every draw of problems. Chosen by the score that it
  reports, it is biased upwards.

  Args:
    n: samples per problem and temperature.
    correct: by temperature, [P] correct samples of each problem.
    ks: the k's, each from 1 to n.
    draws: of P problems with replacement.
    level: share of the draws that the interval holds.
    seed: of the draws.

  Returns:
    By the temperature's name, and 'oracle': k -> estimate.

  Raises:
    ValueError: as `pass_at_k`; no problems, or not as many for each
      temperature.
  """
  sizes = {t: len(counts) for t, counts in correct.items()}
  if len(set(sizes.values())) != 1 or 0 in sizes.values():
    raise ValueError(f"problems by temperature: {sizes}; give as many, above 0")
  problems = next(iter(sizes.values()))
  chosen = np.random.default_rng(seed).integers(
    problems, size=(draws, problems)
  )
  temperatures = [*correct]
  found = {f"{t:g}": {} for t in temperatures} | {"oracle": {}}
  for k in ks:
    values = np.stack([pass_at_k(n, correct[t], k) for t in temperatures])
    means, drawn = values.mean(1), values[:, chosen].mean(-1)  # [t], [t, draws]
    for i, t in enumerate(temperatures):
      found[f"{t:g}"][k] = _estimate(means[i], drawn[i], level, t)
    best = int(means.argmax())
    found["oracle"][k] = _estimate(
      means[best], drawn.max(0), level, temperatures[best]
    )
  return found


def _estimate(mean, drawn, level, temperature) -> Estimate:
  low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
  return Estimate(float(mean), float(low), float(high), float(temperature))
