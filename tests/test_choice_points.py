"""`tasks.choice_points` and its claim."""

import numpy as np
import pytest

from experiments.claims.choice_points import report, weights
from experiments.measure import tidy
from mtp_jax import tokenizer
from mtp_jax.tasks import choice_points
from tests import parameters

LANGUAGE = choice_points.Language(letters=5, tail=3, blocks=8)


def test_only_choices_have_consequences():
  documents = choice_points.draw(LANGUAGE, 40, np.random.default_rng(0))
  assert documents.shape == (40, 40)
  seen = {"?": set(), "!": set()}
  for document in documents:
    text = tokenizer.Bytes().decode(document)
    for i in range(0, 40, 5):
      sign, letter, *tail = text[i : i + 5]
      assert sign == "?!"[i // 5 % 2]
      assert "".join(tail) == (letter * 3 if sign == "?" else "xxx")
      seen[sign].add(letter)
  assert seen == {"?": set("abcde"), "!": set("abcde")}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_choice_point_has_the_papers_number_of_terms(n):
  found = choice_points.terms(LANGUAGE, n)
  assert LANGUAGE.counted == 2
  assert found["choice"].sum() == 2 * n * (n + 1) / 2
  assert found["idle"].sum() == 2 * n
  assert not (found["choice"] & found["idle"]).any()


def test_terms_are_the_uncertain_ones():
  """By hand: head 3 at the sign before a choice predicts its tail."""
  found = choice_points.terms(LANGUAGE, 4)["choice"]
  assert found[2, 10] and found[0, 10] and found[3, 7]
  assert not found[0, 11]  # behind the choice its tail is certain
  assert not found[2, 7]  # the sign itself is certain


@pytest.mark.parametrize("n", [1, 3])
def test_the_loss_is_that_of_the_terms(n):
  """Every term of a model that knows nothing costs about log V."""
  net = parameters.random_model(n_future=n, vocab=128, deviation=1e-4)
  documents = choice_points.draw(LANGUAGE, 3, np.random.default_rng(0))
  found = weights.weigh(net, documents, LANGUAGE)
  nats = np.log(128) / np.log(5)
  assert found["choice"] == pytest.approx(n * (n + 1) / 2 * nats, rel=1e-3)
  assert found["idle"] == pytest.approx(n * nats, rel=1e-3)
  assert found["loss ratio"] == pytest.approx((n + 1) / 2, rel=1e-3)


def test_languages_that_cannot_be_drawn_are_refused():
  with pytest.raises(ValueError, match="21 letters: take 2 to 20"):
    choice_points.Language(21, 3, 8)
  with pytest.raises(ValueError, match="3 and 7 blocks: take a tail of 0"):
    choice_points.Language(5, 3, 7)
  with pytest.raises(ValueError, match="5 heads look beyond a tail of 3"):
    choice_points.terms(LANGUAGE, 5)


@pytest.mark.slow
def test_the_claim_at_scale_test(tmp_path, call):
  module = "experiments.claims.choice_points"
  code, out, err = call("--scale=test", f"--output={tmp_path}", module=module)
  assert code == 0 and "2 runs done" in out, err
  found = {
    (row.run, row.step): row.value
    for row in tidy.read(tmp_path)
    if row.metric == "loss ratio"
  }
  assert found.keys() == {(f"n={n}", step) for n in (1, 2) for step in (0, 2)}
  assert found["n=2", 0] == pytest.approx(1.5, rel=0.2)
  table = report.table(tidy.read(tmp_path))
  assert table in out
  assert (tmp_path / "sweep.png").stat().st_size > 1000
