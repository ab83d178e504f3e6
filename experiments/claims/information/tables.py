"""Entropies of two variables X and Y, from tables of probabilities.

p is how the data are distributed, q is what a model says: both [X, Y], in
nats. Everything is float64.

Reference: the paper, section 5.2 and appendix L.2.
"""

import numpy as np


def cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
  """H(p, q) = -sum p log q, of tables of any one shape."""
  inside = p > 0  # 0 log 0 = 0
  return float(-(p[inside] * np.log(q[inside])).sum())


def conditional(p: np.ndarray, q: np.ndarray, given: int) -> float:
  """The cross-entropy of one variable given the other.

  H(p_{X|Y}, q_{X|Y}) = sum_y p(y) H(p(.|y), q(.|y)) with `given=1`, that of
  Y given X with `given=0`.

  Args:
    p, q: [X, Y].
    given: the axis of the variable that is known.
  """
  other = 1 - given
  known_p, known_q = (t.sum(other, keepdims=True) for t in (p, q))
  shares = np.divide(p, known_p, out=np.zeros_like(p), where=known_p > 0)
  inside = p > 0
  terms = np.zeros_like(p)
  terms[inside] = -shares[inside] * np.log((q / known_q)[inside])
  return float((known_p * terms).sum())


def relative_information(p: np.ndarray, q: np.ndarray) -> float:
  """The relative mutual information D(p || q_X q_Y) - D(p || q).

  Computed from this definition, not as a sum of cross-entropies. It is the
  mutual information of p where q = p, and may be negative elsewhere.
  """
  independent = q.sum(1, keepdims=True) * q.sum(0, keepdims=True)
  return _divergence(p, independent) - _divergence(p, q)


def _divergence(p, q):
  inside = p > 0
  return float((p[inside] * np.log(p[inside] / q[inside])).sum())


def residuals(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
  """Left side minus right side of the paper's identities; 0 but for rounding.

  Returns:
    `lemma`: H(p_X, q_X) - H(p_{X|Y}, q_{X|Y}) - I, lemma L.3.
    `sum`: H(p_X, q_X) + H(p_Y, q_Y) - H(p_{X|Y}, q_{X|Y}) - 2 I
      - H(p_{Y|X}, q_{Y|X}), of which the training loss of two heads is the
      left side.
    `marginals`: I - H(p_X, q_X) - H(p_Y, q_Y) + H(p, q).
  """
  x, y = (cross_entropy(p.sum(axis), q.sum(axis)) for axis in (1, 0))
  x_given_y, y_given_x = (conditional(p, q, given) for given in (1, 0))
  shared = relative_information(p, q)
  return {
    "lemma": x - x_given_y - shared,
    "sum": x + y - x_given_y - 2 * shared - y_given_x,
    "marginals": shared - x - y + cross_entropy(p, q),
  }


def random_table(
  rng: np.random.Generator, rows: int, columns: int, zeros: float = 0.0
) -> np.ndarray:
  """A table [rows, columns] that sums to 1, its entries of many magnitudes.

  Args:
    rng: draws it.
    rows, columns: its shape.
    zeros: share of the entries that are 0.
  """
  table = np.exp(3 * rng.standard_normal((rows, columns)))
  table[rng.random(table.shape) < zeros] = 0
  table.flat[rng.integers(table.size)] += 1  # never all of it
  return table / table.sum()
