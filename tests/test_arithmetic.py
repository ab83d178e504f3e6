"""Polynomials over F_7 modulo X^5: the ring, expressions, and the measure."""

import jax
import numpy as np
import pytest

from configs.paper import arithmetic as paper
from configs.paper import base
from experiments.claims.arithmetic import report, scales, training
from experiments.measure import device_loop, sweep, tidy
from mtp_jax.tasks import arithmetic
from tests import parameters

ONE, X = np.eye(5, dtype=int)[:2]


@pytest.fixture(scope="module")
def elements():
  return np.random.default_rng(0).integers(0, 7, (3, 200, 5))


def of_numpy(found):
  """A numpy polynomial as an element of the ring."""
  coefficients = found.coef.round().astype(int)[:5] % 7
  return np.pad(coefficients, (0, 5 - len(coefficients)))


def test_operations_are_those_of_numpys_polynomials(elements):
  f, g, _ = elements
  product, sum_ = arithmetic.multiply(f, g), arithmetic.add(f, g)
  composed, negative = arithmetic.compose(f, g), arithmetic.negate(f)
  for i in range(len(f)):
    p, q = np.polynomial.Polynomial(f[i]), np.polynomial.Polynomial(g[i])
    np.testing.assert_array_equal(product[i], of_numpy(p * q))
    np.testing.assert_array_equal(sum_[i], of_numpy(p + q))
    np.testing.assert_array_equal(composed[i], of_numpy(p(q)))
    np.testing.assert_array_equal(negative[i], of_numpy(-p))


def test_laws_of_the_ring(elements):
  f, g, h = elements
  add, multiply = arithmetic.add, arithmetic.multiply
  compose, same = arithmetic.compose, np.testing.assert_array_equal
  for operation, neutral in ((add, 0 * ONE), (multiply, ONE)):
    same(operation(f, g), operation(g, f))
    same(operation(operation(f, g), h), operation(f, operation(g, h)))
    same(operation(f, neutral), f)
  same(multiply(f, add(g, h)), add(multiply(f, g), multiply(f, h)))
  same(add(f, arithmetic.negate(f)), np.zeros_like(f))
  same(compose(add(f, g), h), add(compose(f, h), compose(g, h)))
  same(compose(f, X), f)
  same(compose(X, g), g)
  # Any integers are taken modulo 7.
  same(multiply(f - 7, g + 14), multiply(f, g))


def evaluate(text):
  """The value of an expression, read by a parser of its own."""

  def operand(at):
    if text[at] != "(":
      return np.array([*map(int, text[at : at + 5])]), at + 5
    if text[at + 1] == "-":
      value, at = operand(at + 2)
      assert text[at] == ")"
      return arithmetic.negate(value), at + 1
    left, at = operand(at + 1)
    operation = {
      "+": arithmetic.add,
      "*": arithmetic.multiply,
      "@": arithmetic.compose,
    }[text[at]]
    right, at = operand(at + 1)
    assert text[at] == ")"
    return operation(left, right), at + 1

  value, end = operand(0)
  assert end == len(text)
  return value


def test_expressions_have_their_operations_and_values():
  operations = np.arange(500) % 11
  found = arithmetic.draw(np.random.default_rng(1), operations)
  for text, m, value in zip(
    found.strings(), operations, found.values, strict=True
  ):
    assert text.count("(") == m == sum(map(text.count, "+*@-"))
    np.testing.assert_array_equal(evaluate(text), value)
  again = arithmetic.draw(np.random.default_rng(1), operations)
  assert again.strings() == found.strings()
  with pytest.raises(ValueError, match="-1 operations"):
    arithmetic.draw(np.random.default_rng(1), [2, -1])


def test_operations_and_coefficients_are_uniform():
  found = arithmetic.draw(np.random.default_rng(2), [3] * 4000)
  text = "".join(found.strings())
  counts = [text.count(c) for c in "-+*@"]
  assert sum(counts) == 12_000 and max(abs(c - 3000) for c in counts) < 250
  digits = np.array([text.count(str(d)) for d in range(7)])
  assert abs(digits / digits.sum() - 1 / 7).max() < 0.01 and "7" not in text
  # Both operands of a binary operation at the top get operations.
  tops = [s for s in found.strings() if s[1] != "-"]
  assert 0.2 < np.mean([s[1] != "(" for s in tops]) < 0.45


def test_a_document_is_question_pauses_and_answer():
  found = arithmetic.draw(np.random.default_rng(3), [1, 0, 4])
  text = arithmetic.documents(found, pauses=2)
  tokens, equals = arithmetic.tokenise(found, pauses=2)
  for i, line in enumerate(text):
    question, answer = line.split("..=")
    assert answer == "".join(map(str, evaluate(question)))
    ids = [256, *line.encode(), 257]
    assert tokens[i].tolist() == ids + [0] * (tokens.shape[1] - len(ids))
    assert equals[i] == ids.index(ord("="))


def test_rows_hold_whole_documents():
  found = arithmetic.draw(np.random.default_rng(4), [1, 2, 0, 1, 2, 3])
  batch = arithmetic.pack(found, 1, seq_len=53, reach=3, answers_only=True)
  assert batch.tokens.shape[1] == 56 and not batch.segments[:, 53:].any()
  seen = []
  for tokens, segments, weight in zip(
    batch.tokens, batch.segments, batch.weight, strict=True
  ):
    for document in range(1, segments.max() + 1):
      inside = segments == document
      seen.append(bytes(tokens[inside][1:-1].tolist()).decode())
      learnt = tokens[inside & (weight > 0)]
      assert bytes(learnt[:-1].tolist()).decode() == seen[-1].split("=")[1]
      assert learnt[-1] == 257
    assert not (weight[segments == 0]).any()
  assert seen == arithmetic.documents(found, 1)
  with pytest.raises(ValueError, match="document 5 has .* seq_len 30"):
    arithmetic.pack(found, seq_len=30, reach=1)


def test_exact_match_is_that_of_written_answers():
  """A model whose answers are right, wrong early, or wrong late."""
  net = parameters.random_model("unembedding", vocab=259, n_future=2, layers=1)
  found = arithmetic.draw(np.random.default_rng(5), [1, 2, 1, 0, 2])
  tokens, equals = arithmetic.tokenise(found, 1)
  each, read = np.arange(5), jax.jit(lambda net, tokens: net(tokens)[0])
  text = tokens.copy()
  for i in range(1, 6):  # greedy decoding, a token at a time
    logits = read(net, text)[each, equals + i - 1]
    text[each, equals + i] = logits.argmax(-1)
  # As if what it writes were the true answer, but for two of them.
  values = text[each[:, None], equals[:, None] + np.arange(1, 6)] - ord("0")
  values[1, 4] += 1
  values[3, 0] += 1
  judged = arithmetic.Expressions(found.text, found.lengths, values)
  hits = arithmetic.exact_match(net, judged, 1, rows=2)
  assert hits.tolist() == [True, False, True, False, True]


def test_the_sweep(tmp_path):
  """A run of a tiny model: its figures, and what is drawn from them."""
  runs = training.runs(scales.SCALES["test"])
  names = [(one.name, one.seed) for one in runs]
  assert names == [
    *(("tiny n=1", 0), ("tiny n=2", 0)),
    *(("tiny n=1 pauses=5", 0), ("tiny n=2 pauses=5", 0)),
  ]
  outcome = sweep.run(runs[1:2], tmp_path)
  assert not outcome.failed
  rows = tidy.read(tmp_path)
  steps = [r.step for r in rows if r.metric == "exact_match m=2"]
  assert steps == [2, 4]
  assert {"nats head=1", "nats head=2", "tokens_per_second"} <= {
    r.metric for r in rows
  }
  text = report.section(rows, tmp_path / tidy.FILE)
  assert "| n=2 | 0.0% | 0.0% |" in text
  assert (tmp_path / "sweep.png").exists()


def test_an_accelerator_compiles_ahead(monkeypatch):
  asked = []
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(
    device_loop, "compiled", lambda cfg, K: asked.append((cfg.model, K))
  )
  monkeypatch.setattr(
    device_loop, "evaluate_ahead", lambda cfgs, evaluate: evaluate("net")
  )
  monkeypatch.setattr(
    arithmetic,
    "exact_match",
    lambda net, some, pauses, *, rows: asked.append((net, len(some), rows)),
  )
  scale = scales.SCALES["test"]
  training.prepare(scale)
  programs = [(scale.config("tiny", n, 0).model, 2) for n in (1, 2)]
  assert asked == [*programs, ("net", 4, 4)]  # of one pass, of the same shape


def test_every_run_reads_the_same_expressions():
  rows = [training.rows(training.Text(5, 0, True, 128, 4), 40, 1) for _ in "ab"]
  assert rows[0] is rows[1] and rows[0].tokens.shape == (40, 132)


@pytest.mark.parametrize("size", ["30M", "100M"])
def test_the_papers_scale_is_its_config(size):
  cfg = scales.SCALES["paper"].config(size, 4, 1)
  theirs = paper.get_config(f"{size}-n4").replace(train={"seed": 1})
  assert cfg == base.one_row_per_chip(theirs, 1)
