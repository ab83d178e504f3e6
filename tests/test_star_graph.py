"""`tasks.star_graph` and the claim `planning`."""

import dataclasses

import numpy as np
import pytest

from experiments.claims.planning import report, scales
from experiments.measure import tidy
from mtp_jax import loss, tokenizer
from mtp_jax.decode import generate, layout
from mtp_jax.tasks import star_graph
from tests import parameters

SHAPE = star_graph.Shape(3, 4, 20)


@pytest.fixture(scope="module")
def documents():
  return star_graph.draw(SHAPE, 50, np.random.default_rng(0))


def read(document):
  """(edges, centre, goal, path) of a document, from its text."""
  text = tokenizer.Bytes().decode(document)
  graph, path = text.split("=")
  edges, ends = graph.split(":")
  return edges.split(","), *ends, path


def test_documents_are_star_graphs(documents):
  assert documents.shape == (50, SHAPE.tokens)
  orders, names = set(), set()
  for document in documents:
    edges, centre, goal, path = read(document)
    assert path.endswith(".")
    path = path[:-1]
    assert len(edges) == len(set(edges)) == 9
    after = {}
    for start, end in edges:
      after.setdefault(start, []).append(end)
    nodes = set("".join(edges))
    assert len(nodes) == SHAPE.nodes == 10
    assert nodes <= set(star_graph.NAMES[:20])
    # From the centre three arms lead, which do not meet.
    assert len(after.pop(centre)) == 3
    assert all(len(ends) == 1 for ends in after.values())
    assert len(path) == 3 and path[-1] == goal
    walked = centre + path
    for step in range(3):
      assert walked[step : step + 2] in edges
    orders.add(edges.index(centre + path[0]))
    names.add(path[0])
  assert len(orders) > 5 and len(names) > 10  # neither place nor name tells


def test_only_the_path_weighs(documents):
  batch = star_graph.batch(documents, SHAPE, n_future=3)
  targets = loss.future_targets(batch, 3)
  assert batch.tokens.shape == (50, SHAPE.tokens - 1 + 3)
  learnt = np.asarray(targets.tokens[0])[np.asarray(targets.weight[0]) > 0]
  assert learnt.reshape(50, 4).tolist() == documents[:, -4:].tolist()
  # Head 3 at the equals sign predicts the goal.
  at = SHAPE.prompt - 1
  assert np.array_equal(targets.tokens[2, :, at], documents[:, -2])
  assert (np.asarray(targets.weight)[:, :, at] == 1).all()
  assert (np.asarray(targets.tokens)[1:, :, -1] == -1).all()  # padding


def test_accuracy_is_that_of_greedy_decoding(documents):
  """On a model that writes paths right here and there: few names, random."""
  net = parameters.random_model(n_future=2, vocab=128, deviation=0.5)
  prompts = [*documents[:, : SHAPE.prompt]]
  texts = generate.generate(
    layout.lay_out(net, 128), prompts, heads=1, max_new=SHAPE.steps
  ).tokens
  # Documents whose paths are what the model writes, wholly or at first.
  ours = documents.copy()
  ours[:, SHAPE.prompt : -1] = texts
  ours[::2, -2] += 1
  ours[::5, SHAPE.prompt] += 1
  found = star_graph.accuracy(net, ours, SHAPE)
  assert found == {"first": pytest.approx(0.8), "path": pytest.approx(0.4)}


def test_shapes_that_ask_nothing_are_refused():
  for sizes in ((1, 4), (2, 1)):
    with pytest.raises(ValueError, match="has no path to choose: take 2 arms"):
      star_graph.Shape(*sizes)
  with pytest.raises(ValueError, match=r"G\(9,9\) has 73 nodes, and 62 names"):
    star_graph.Shape(9, 9)
  with pytest.raises(ValueError, match="10 nodes, and 9 names"):
    dataclasses.replace(SHAPE, names=9)


@pytest.mark.parametrize("scale", scales.SCALES.values(), ids=scales.SCALES)
def test_every_n_has_the_same_trunk(scale):
  for graph in scale.graphs:
    shapes = [scale.config(graph, n, 0).model for n in scale.heads]
    assert {shape.trunk_layers for shape in shapes} == {scale.trunk}
    assert [shape.head_layers for shape in shapes] == list(scale.heads)


@pytest.mark.slow
def test_the_claim_at_scale_test(tmp_path, call):
  module = "experiments.claims.planning"
  code, out, err = call("--scale=test", f"--output={tmp_path}", module=module)
  assert code == 0 and "2 runs done" in out, err
  rows = tidy.read(tmp_path)
  steps = {(row.run, row.step) for row in rows if row.metric == "path"}
  assert steps == {(f"G(2,3) n={n}", step) for n in (1, 2) for step in (2, 4)}
  table = report.table(rows)
  assert table in out
  assert (tmp_path / "sweep.png").stat().st_size > 1000
