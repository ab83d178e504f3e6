"""`experiments.claims.information`: the identities, and trained heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims.information import __main__ as program
from experiments.claims.information import predictions, report, tables
from experiments.measure import tidy
from tests import parameters


def test_the_papers_identities_hold_to_machine_precision():
  """Lemma L.3, its sum, on tables with and without zeros."""
  figures = {f.metric: f.value for f in program.check_tables(50)}
  assert set(figures) == {
    f"largest residual: {name}" for name in ("lemma", "sum", "marginals")
  }
  assert max(figures.values()) < 1e-13  # of nats between 0 and 20


def test_definitions_by_hand():
  p = np.array([[0.5, 0.0], [0.25, 0.25]])
  q = np.full((2, 2), 0.25)
  assert tables.cross_entropy(p, q) == pytest.approx(np.log(4))
  assert tables.conditional(p, q, given=1) == pytest.approx(np.log(2))
  assert tables.relative_information(p, q) == pytest.approx(0, abs=1e-15)
  # X = 0 leaves no doubt of Y, X = 1 a whole bit; half of the time each.
  assert tables.conditional(p, p, given=0) == pytest.approx(np.log(2) / 2)
  # Y = 0 in 3/4 of the cases, and then X = 0 in 2/3 of them.
  thirds = -(2 * np.log(2 / 3) + np.log(1 / 3)) / 3
  assert tables.conditional(p, p, given=1) == pytest.approx(0.75 * thirds)


def test_relative_information_may_be_negative():
  p = np.array([[0.5, 0.0], [0.0, 0.5]])
  q = np.array([[0.1, 0.4], [0.4, 0.1]])
  assert tables.relative_information(p, q) < 0
  assert tables.relative_information(p, p) == pytest.approx(np.log(2))


@pytest.fixture(scope="module")
def measured():
  """(model, windows, log-probabilities of what follows)."""
  net = parameters.random_model(n_future=2, vocab=13)
  windows = np.random.default_rng(0).integers(0, 13, (6, 9)).astype(np.int32)
  found = predictions.log_probabilities(net, windows, 3)
  return net, windows, {k: np.asarray(v) for k, v in found.items()}


def test_the_marginal_is_the_sum_over_all_tokens(measured):
  """Against the whole table q(x, y | c), from logits of ordinary calls."""
  net, windows, found = measured
  call = jax.jit(lambda net, tokens: jax.nn.log_softmax(net(tokens)))
  for row, (*context, x, y) in enumerate(windows.tolist()):
    first = call(net, jnp.array([context]))[:, 0, -1]
    after = jnp.array([[*context, other] for other in range(13)])
    after = call(net, after)[0, :, -1]  # [x, y]
    table = np.exp(
      np.asarray(first[0])[:, None] + np.asarray(after), dtype="f8"
    )
    assert table.sum() == pytest.approx(1, abs=1e-5)
    wanted = {
      "x": table.sum(1)[x],
      "y": table.sum(0)[y],
      "y_after_x": table[x, y] / table.sum(1)[x],
      "head_2": np.exp(first[1, y]),
    }
    for name, value in wanted.items():
      np.testing.assert_allclose(np.exp(found[name][row]), value, rtol=1e-4)


def test_figures_obey_the_lemma(measured):
  f = predictions.figures(measured[2])
  assert f["H(X)"] == pytest.approx(f["H(X|Y)"] + f["I"])
  assert f["H(X)"] + f["H(Y)"] == pytest.approx(
    f["H(X|Y)"] + 2 * f["I"] + f["H(Y|X)"]
  )
  gap = f["head 2"] - f["H(Y)"]
  assert f["I from heads"] == pytest.approx(f["I"] + gap)


def test_places_of_words():
  windows = np.array([list(b"a bcd"), list(b" abc "), list(b"a1. x")])
  found = {"y_after_x": np.array([1.0, 2, 3]), "y": np.zeros(3)}
  places = predictions.by_place(found, windows)
  bit = 1 / np.log(2)
  assert places["a word goes on"] == pytest.approx((2 / 3, 1.5 * bit))
  assert places["other"] == pytest.approx((1 / 3, 3 * bit))
  assert "a word begins" not in places


@pytest.mark.slow
def test_the_whole_at_scale_test(tmp_path, call):
  code, out, err = call(
    "--scale=test",
    f"--output={tmp_path}",
    module="experiments.claims.information",
  )
  assert code == 0, err
  assert "2 runs done" in out and "| I from heads |" in out
  rows = tidy.read(tmp_path)
  values = {row.metric: row.value for row in rows if row.run == "n=2"}
  assert values["H(X)"] == pytest.approx(values["H(X|Y)"] + values["I"])
  table = report.tables(rows)
  assert table in out
  assert r"| H(X\|Y) |" in out
  assert (tmp_path / "sweep.png").stat().st_size > 1000
