"""pass@k equals the enumeration of all choices of k samples."""

import itertools

import numpy as np
import pytest

from mtp_jax.evaluate import pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_equals_all_choices(n):
  for right in range(n + 1):
    solved = [i < right for i in range(n)]
    for k in range(1, n + 1):
      choices = [any(some) for some in itertools.combinations(solved, k)]
      (got,) = pass_at_k.pass_at_k(n, [right], k)
      assert got == pytest.approx(np.mean(choices), abs=1e-12)


def test_has_no_bias():
  """Its mean over the binomial distribution of c is 1 - (1 - p)^k."""
  n, p = 11, 0.3
  draws = np.random.default_rng(0).binomial(n, p, 200_000)
  for k in (1, 4, 11):
    got = pass_at_k.pass_at_k(n, draws, k).mean()
    assert got == pytest.approx(1 - (1 - p) ** k, abs=3e-3)


def test_large_counts_do_not_overflow():
  got = pass_at_k.pass_at_k(1000, [0, 1, 999, 1000], 100)
  assert got == pytest.approx([0, 0.1, 1, 1])


def test_the_oracle_takes_the_best_temperature_of_each_k():
  # Cold: the same problem always; hot: each problem once.
  right = {0.1: [10, 0, 0], 0.8: [1, 1, 1]}
  found = pass_at_k.table(10, right, [1, 10], draws=2000)
  assert found["0.1"][1].mean == found["oracle"][1].mean == pytest.approx(1 / 3)
  assert found["oracle"][1].temperature == 0.1
  assert found["oracle"][10] == pass_at_k.Estimate(1, 1, 1, 0.8)
  assert found["0.8"][10] == found["oracle"][10]
  # Of 3 problems drawn again, cold solves 0 to 3 of 3: 8, 12, 6, 1 of 27.
  assert (found["0.1"][1].low, found["0.1"][1].high) == (
    0,
    pytest.approx(2 / 3),
  )
  # The oracle can always fall back on the hot one's tenth.
  assert found["oracle"][1].low == pytest.approx(0.1)


def test_an_interval_covers_the_mean_as_often_as_it_says():
  """200 sets of 60 problems, each solved or not by its one sample."""
  rng, hits = np.random.default_rng(1), 0
  for seed in range(200):
    right = rng.binomial(1, 0.4, 60)
    found = pass_at_k.table(1, {0.0: right}, [1], draws=300, seed=seed)
    hits += found["0"][1].low <= 0.4 <= found["0"][1].high
  assert 0.83 < hits / 200 < 0.96


@pytest.mark.parametrize(
  "n, right, k, words",
  [
    (3, [1], 4, "k=4 is not in 1..3"),
    (3, [1], 0, "k=0 is not in 1..3"),
    (3, [1, 4], 1, "4 correct samples of 3"),
  ],
)
def test_errors_name_the_value(n, right, k, words):
  with pytest.raises(ValueError, match=words):
    pass_at_k.pass_at_k(n, right, k)


def test_every_temperature_has_the_same_problems():
  with pytest.raises(ValueError, match="problems by temperature: {0.1: 1, 0.8"):
    pass_at_k.table(2, {0.1: [1], 0.8: [1, 2]}, [1])
  with pytest.raises(ValueError, match="give as many, above 0"):
    pass_at_k.table(2, {0.1: []}, [1])


def test_correct_samples_are_counted_by_problem_and_temperature():
  verdicts = [
    {"task_id": name, "temperature": t, "passed": passed}
    for name, t, passed in (
      ("b", 0.8, True),
      ("a", 0.8, False),
      ("b", 0.2, False),
      ("b", 0.8, True),
      ("a", 0.2, True),
    )
  ]
  found = pass_at_k.count(["a", "b"], iter(verdicts))
  assert [*found.items()] == [(0.2, [1, 0]), (0.8, [0, 2])]
  with pytest.raises(ValueError, match="c has no verdict at temperature 0.2"):
    pass_at_k.count(["a", "b", "c"], verdicts)
