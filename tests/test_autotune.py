"""Choosing drafts: what is counted, what is tried, what wins."""

import numpy as np
import pytest

from mtp_jax.decode import accept, autotune, loop, sampling
from mtp_jax.decode import tree as tree_lib
from tests.mocks import Mock, mock_text

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]
CHANCES = np.array([[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.1, 0.1]])


def test_acceptance_counts_ranks_where_the_drafts_before_were_right():
  wanted = np.random.default_rng(0).integers(1, 5, (3, 79))
  mock = Mock(wanted, 13, 4)
  got = autotune.measure_acceptance(mock, PROMPTS, max_new=31)
  counts = np.zeros((3, 2))
  for b, prompt in enumerate(PROMPTS):
    length = len(prompt) + 1
    end = len(prompt) + len(mock_text(prompt, 13, 31))
    while length < end:
      right = wanted[b, length - 2]
      for head in range(1, 4):
        counts[head - 1, int(head >= right)] += 1
        if head >= right:
          break
      length += min(right, end - length)
  np.testing.assert_allclose(got[:, :2], (counts.T / counts.sum(1)).T)
  assert not got[:, 2:].any() and got.shape == (3, autotune.CANDIDATES)


def test_what_is_tried():
  trees = autotune.topologies(CHANCES)
  assert trees[:3] == [tree_lib.chain(k) for k in (1, 2, 4)]
  assert [t.size for t in trees[3:]] == [
    8,
    16,
    32,
    40,
  ]  # of 3 ranks there are no more
  assert autotune.topologies(np.zeros((0, 3))) == [tree_lib.chain(1)]


@pytest.mark.parametrize(
  "cost, wins",
  [
    (lambda size: 1.0, 40),  # free of charge: the largest tree
    (lambda size: float(size), 1),  # bound by compute: ordinary decoding
    (lambda size: 30.0 + size, 8),
  ],
)
def test_the_fastest_wins(monkeypatch, cost, wins):
  rules = []

  def seconds(decoder, trees, load, *, rule):
    rules.append(rule)
    return [cost(t.size) for t in trees]

  monkeypatch.setattr(autotune, "seconds_per_pass", seconds)
  monkeypatch.setattr(autotune, "measure_acceptance", lambda *_, **__: CHANCES)
  rule = accept.TopK(2)
  best = autotune.choose(None, PROMPTS, batch=3, max_new=9, rule=rule)
  assert rules == [rule]  # its passes are timed
  assert best.tree.size == wins
  assert best.tokens_per_second == pytest.approx(
    tree_lib.expected(best.tree, CHANCES) / cost(wins)
  )


def test_ordinary_decoding_is_left_for_a_clear_gain_only():
  ordinary = autotune.Option(tree_lib.chain(1), 1.0, 1.0)
  for speed, wins in ((0.9, False), (1.09, False), (1.11, True)):
    drafts = autotune.Option(tree_lib.chain(3), 2.0, 2.0 / speed)
    assert (autotune.best([ordinary, drafts]) is drafts) == wins


def test_one_head_has_nothing_to_choose():
  mock = Mock(np.ones((3, 79), int), 13, 1)
  assert autotune.measure_acceptance(mock, PROMPTS, max_new=9).shape == (0, 10)
  assert autotune.choose(mock, PROMPTS, batch=3, max_new=9).tree.size == 1


def test_expected_tokens_are_those_of_decoding():
  """On the texts that were counted, the chain's figure is what it took."""
  from mtp_jax.decode import generate as decode

  wanted = np.random.default_rng(1).integers(1, 5, (3, 279))
  mock = Mock(wanted, 13, 4)
  chances = autotune.measure_acceptance(mock, PROMPTS, max_new=200)
  got = decode.generate(mock, PROMPTS, heads=4, max_new=200)
  assert tree_lib.expected(tree_lib.chain(4), chances) == pytest.approx(
    got.tokens_per_forward, rel=0.02
  )  # last passes are cut


@pytest.mark.slow
def test_seconds_are_measured(monkeypatch):
  """Of turns that are long enough, in caches that hold them whole."""
  mock = Mock(np.ones((2, 79), int), 13, 4)
  trees, turns, rules = autotune.topologies(CHANCES)[:5:2], [], []
  sizes = {}
  run = loop.run_jit

  def counted(decoder, rule, state):
    state = run(decoder, rule, state)
    turns.append((state.tree, int(state.statistics.passes.max())))
    sizes[state.tree] = mock.capacity(state.cache)
    rules.append(rule)
    return state

  monkeypatch.setattr(loop, "run_jit", counted)
  monkeypatch.setattr(autotune, "CALL", 60.0)  # on a busy machine too
  load = autotune.Load(2, 19)
  found = autotune.seconds_per_pass(mock, trees, load, repeats=3)
  assert len(found) == len(trees) and min(found) > 0
  timed = turns[2 * len(trees) :]  # each was compiled and tried before
  assert [tree for tree, _ in timed] == trees * 3
  assert {passes for _, passes in timed} == {autotune.PASSES}
  monkeypatch.setattr(autotune, "CALL", 0.0)
  turns.clear()
  autotune.seconds_per_pass(mock, trees, load, repeats=3)
  assert {passes for _, passes in turns} == {8}
  assert rules[-1].rule is accept.GREEDY
  drawn = accept.SpeculativeSampling(sampling.Sampler(penalty=1.5))
  autotune.options(mock, CHANCES, load, trees=trees, rule=drawn)
  assert rules[-1].rule is drawn  # its work is timed
  # Behind 740 tokens a growing cache would have 768 positions, or 1024.
  monkeypatch.setattr(autotune, "CALL", 9.0)
  load = autotune.Load(2, 740)
  assert autotune.seconds_per_pass(mock, trees[:1], load, repeats=3)[0] > 0
  assert turns[-1][1] == autotune.PASSES
  # A text of 256 tokens fits into 256 positions, and a longer window does not.
  for longest, last in (0, 256), (256, 384):
    load = autotune.Load(2, 160, longest)
    autotune.seconds_per_pass(mock, trees[:2], load, repeats=1)
    assert [sizes[tree] for tree in trees[:2]] == [256, last]
