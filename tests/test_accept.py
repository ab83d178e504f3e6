"""Rules against loops in plain Python: what they accept, propose, refuse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtp_jax.decode import accept, sampling
from mtp_jax.decode import tree as tree_lib


def keys(seed, count):
  return jax.random.split(jax.random.key(seed), count)


def tree_of(paths):
  """'0 1 00' -> the tree of (0,), (1,) and (0, 0)."""
  return tree_lib.from_paths([map(int, path) for path in paths.split()])


ROWS = 100_000


def pvalue(counts, law):
  """Of a chi-square test; what has no chance must not occur."""
  counts, law = np.ravel(counts), np.ravel(law)
  assert not counts[law == 0].any()
  counts, law = counts[law > 0], law[law > 0]
  return stats.chisquare(counts, law / law.sum() * counts.sum()).pvalue


def judge(tree, tokens, logits, drafts=None):
  """What a rule decides from, of candidates [B, D, R]."""
  root = jnp.zeros((len(logits), 1), jnp.int32)
  window = jnp.concatenate(
    [root, jnp.asarray(tokens)[:, tree.depth[1:] - 1, tree.rank[1:]]], 1
  )
  logits = jnp.asarray(logits)
  return accept.Verification(window, logits, logits.argmax(-1), drafts, None)


@functools.partial(jax.jit, static_argnames="tree")
def decide(rule, tree, judged, seed=0):
  node, free = rule.accept(tree, judged, keys(seed, len(judged.tokens)))
  assert node.dtype == jnp.int32 and free.dtype == jnp.int32
  return node, free


def random_tree(rng, nodes=11, drafts=3, width=3):
  """Gaps between siblings included."""
  known = [()]
  while len(known) <= nodes:
    child = (*known[rng.integers(len(known))], int(rng.integers(width)))
    if len(child) <= drafts and child not in known:
      known.append(child)
  return tree_lib.from_paths(known[1:])


TREES = [
  tree_lib.Tree(),
  tree_lib.chain(4),
  tree_of("0 1 2 00 01 02 10 11 20 000"),
  *(random_tree(np.random.default_rng(i)) for i in range(2)),
]


def candidates(rng, rows, tree, vocab):
  """[rows, D, R] of which no two of a depth are the same."""
  shape = rows, tree.drafts, vocab
  return rng.permuted(np.tile(np.arange(vocab), (*shape[:2], 1)), axis=-1)[
    ..., : tree.width
  ]


def deepest_by_hand(tree, stands, score=None):
  """Index of the node; `stands` and `score` tell of nodes by their paths."""
  nodes = [(), *tree.paths]
  whole = [
    (len(node), score(node) if score else 0, -i)
    for i, node in enumerate(nodes)
    if all(stands(node[:d]) for d in range(1, len(node) + 1))
  ]
  return -max(whole)[2]


def expect(rule, tree, tokens, logits, stands, free):
  """Compares a rule with `stands(row, token, logits, node)` and `free(row)`.

  Returns the depths.
  """
  judged = judge(tree, tokens, logits)
  node, token = map(np.asarray, decide(rule, tree, judged))
  number = {path: i for i, path in enumerate([(), *tree.paths])}
  for b in range(len(logits)):

    def one(path, b=b):
      said = logits[b, number[path[:-1]]].tolist()
      return stands(path, tokens[b, len(path) - 1, path[-1]], said)

    assert node[b] == deepest_by_hand(tree, one)
    assert token[b] == free(logits[b, node[b]].tolist())
  return tree.depth[node]


def first_best(logits):
  return logits.index(max(logits))


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_greedy_against_a_walk(tree):
  rng = np.random.default_rng(0)
  B, V = 211, 4
  tokens = candidates(rng, B, tree, V)
  logits = rng.integers(-2, 3, (B, tree.size, V)).astype(np.float32)
  node, free = decide(accept.GREEDY, tree, judge(tree, tokens, logits))
  nodes = [(), *tree.paths]
  for b in range(B):
    path = ()
    while True:
      best = first_best(logits[b, nodes.index(path)].tolist())
      on = [
        (*path, r)
        for r in range(tree.width)
        if (*path, r) in nodes and tokens[b, len(path), r] == best
      ]
      if not on:
        break
      (path,) = on
    assert nodes[node[b]] == path and free[b] == best
  assert set(tree.depth[node]) == set(range(tree.drafts + 1))


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_deepest_against_loops(tree):
  rng = np.random.default_rng(1)
  B = 211
  stands = rng.random((B, tree.size)) < 0.7  # the root's does not count
  score = rng.integers(-5, 1, (B, tree.size)).astype(np.float32)
  by_number = jax.jit(accept.deepest, static_argnums=0)
  first = by_number(tree, jnp.asarray(stands))
  best = by_number(tree, jnp.asarray(stands), jnp.asarray(score))
  assert first.dtype == best.dtype == jnp.int32
  number = {path: i for i, path in enumerate([(), *tree.paths])}
  for b in range(B):

    def stands_here(path, b=b):
      return stands[b, number[path]]

    def score_here(path, b=b):
      return score[b, number[path]]

    assert first[b] == deepest_by_hand(tree, stands_here)
    assert best[b] == deepest_by_hand(tree, stands_here, score_here)
  if not tree.is_chain:
    assert (first != best).any()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("tree", TREES[1:], ids=range(len(TREES[1:])))
def test_top_k_against_loops(tree, k):
  rng = np.random.default_rng(2)
  B, V = 101, 7
  tokens = candidates(rng, B, tree, V)
  logits = rng.integers(-9, 10, (B, tree.size, V)).astype(np.float32)

  def stands(path, token, said):
    return said[token] >= sorted(said, reverse=True)[k - 1]

  depths = expect(accept.TopK(k), tree, tokens, logits, stands, first_best)
  assert len(set(depths)) >= 3


def test_top_1_is_greedy():
  tree, rng = tree_lib.chain(4), np.random.default_rng(3)
  tokens = candidates(rng, 211, tree, 3)
  logits = rng.normal(size=(211, tree.size, 3)).astype(np.float32)
  judged = judge(tree, tokens, logits)
  one, other = (
    decide(r, tree, judged) for r in (accept.TopK(1), accept.GREEDY)
  )
  np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("paths", ["0 00 000", "0 1 2 00 01 10 20 000 001 200"])
def test_a_block_stands_unseen(paths):
  tree, rng = tree_of(paths), np.random.default_rng(4)
  B, V = 101, 7
  tokens = candidates(rng, B, tree, V)
  logits = rng.normal(size=(B, tree.size, V)).astype(np.float32)
  for block in range(1, tree.heads + 1):
    rule = accept.TopK(2, block)
    rule.check(tree)

    def stands(path, token, said, block=block):
      forced = not any(path) and len(path) < block
      return forced or said[token] >= sorted(said)[-2]

    depths = expect(rule, tree, tokens, logits, stands, first_best)
    assert min(depths) == block - 1  # written are one more
    assert block == tree.heads or max(depths) >= block


def typical_by_hand(rule, tree, tokens, logits):
  """(node, {token: chance of the free one}, margin) of one row, in float64."""
  x = logits.astype(float) / rule.temperature
  p = np.exp(x - x.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
  least = np.minimum(rule.epsilon, rule.delta * np.exp(-entropy))
  number = {path: i for i, path in enumerate([(), *tree.paths])}

  def share(path):
    token = tokens[len(path) - 1, path[-1]]
    return p[number[path[:-1]], token]

  def stands(path):
    return share(path) > least[number[path[:-1]]]

  def score(path):
    return math.prod(share(path[:d]) for d in range(1, len(path) + 1))

  node = deepest_by_hand(tree, stands, score)
  free = {v: s for v, s in enumerate(p[node]) if s > least[node]}
  free = free or {int(p[node].argmax()): 1.0}
  return node, free, abs(p - least[:, None]).min()


TYPICAL = [
  accept.Typical(),
  accept.Typical(epsilon=0.2, delta=0.6, temperature=0.7),
  accept.Typical(epsilon=0.9, delta=7.0),  # only what is all but certain
]


@pytest.mark.parametrize("rule", TYPICAL, ids=range(len(TYPICAL)))
@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_typical_against_float64(tree, rule):
  rng = np.random.default_rng(14)
  B, V = 101, 5
  tokens = candidates(rng, B, tree, V)
  logits = rng.normal(0, 2, (B, tree.size, V)).astype(np.float32)
  node, free = decide(rule, tree, judge(tree, tokens, logits))
  later = ties = 0
  for b in range(B):
    want, law, margin = typical_by_hand(rule, tree, tokens[b], logits[b])
    assert margin > 1e-6  # shares in float32 are off by a few 6e-8
    assert node[b] == want and int(free[b]) in law
    later += tree.depth[want] > 0
    ties += want > np.flatnonzero(tree.depth == tree.depth[want])[0]
  assert later or not tree.drafts
  assert ties or tree.is_chain or rule.epsilon > 0.5


def test_typical_draws_the_free_token_from_what_would_stand():
  tree, V = tree_of("0 1"), 5
  rng = np.random.default_rng(9)
  rows = 11
  tokens = candidates(rng, rows, tree, V)
  logits = rng.normal(0, 1.5, (rows, tree.size, V)).astype(np.float32)
  told = 0
  for rule in TYPICAL:
    times = ROWS // rows
    judged = judge(
      tree, np.repeat(tokens, times, 0), np.repeat(logits, times, 0)
    )
    _, free = decide(rule, tree, judged)
    for b, drawn in enumerate(np.asarray(free).reshape(rows, times)):
      _, law, _ = typical_by_hand(rule, tree, tokens[b], logits[b])
      assert set(drawn.tolist()) == set(law)  # none rarer than one in fifty
      assert min(law.values()) / sum(law.values()) > 0.02
      if len(law) > 1:
        counts = np.bincount(drawn, minlength=V)
        law = np.array([law.get(v, 0) for v in range(V)])
        assert pvalue(counts, law) > 1e-4  # of some twenty of these
        told += pvalue(counts, np.where(law > 0, law + 0.05, 0)) < 1e-6
  assert told > 5


def test_typical_takes_the_likeliest_of_paths_though_another_is_impossible():
  """Like the padding ids of a vocabulary, which have no chance at all."""
  tree = tree_of("0 1 2")
  logits = np.zeros((1, 4, 5), np.float32)
  logits[0, 0] = [-np.inf, 1, 2, 0, 0]
  judged = judge(tree, np.array([[[0, 1, 2]]]), logits)
  node, _ = decide(accept.Typical(), tree, judged)
  assert node.tolist() == [3]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_forced_goes_down_the_first_choices(tree):
  rng = np.random.default_rng(10)
  B, V = 7, 5
  tokens = candidates(rng, B, tree, V)
  logits = rng.normal(size=(B, tree.size, V)).astype(np.float32)
  nodes = [(), *tree.paths]
  spine = max(len(path) for path in nodes if not any(path))
  for count in range(6):
    node, free = decide(accept.Forced(count), tree, judge(tree, tokens, logits))
    want = nodes.index((0,) * min(count, spine))
    assert node.tolist() == [want] * B
    _, token = decide(accept.GREEDY, tree, judge(tree, tokens, logits))
    assert free.tolist() == token.tolist()


def test_forced_drafts_cost_what_their_rule_does():
  tree, rng = tree_lib.chain(3), np.random.default_rng(15)
  logits = jnp.asarray(rng.normal(size=(5, 3, 7)), jnp.float32)
  rule = accept.Lossless(sampling.Sampler(temperature=0.8, penalty=1.5))
  forced = accept.Forced(1, rule)
  assert forced.uses_seen() and rule.uses_seen()
  seen = jnp.zeros((5, 7), bool)
  drafts = forced.propose(logits[:, 1:], 1, seen, keys(0, 5))
  for got, want in zip(
    drafts, rule.propose(logits[:, 1:], 1, seen, keys(0, 5)), strict=True
  ):
    np.testing.assert_array_equal(got, want)
  window = jnp.pad(drafts.tokens[..., 0], ((0, 0), (1, 0)))
  judged = accept.Verification(window, logits, logits.argmax(-1), drafts, seen)
  node, free = forced.accept(tree, judged, keys(1, 5))
  assert node.tolist() == [1] * 5
  want = rule.accept(tree, judged, keys(1, 5))[1]
  np.testing.assert_array_equal(free, want)
  assert (free != judged.best[:, 1]).any()  # drawn


def test_numbers_compile_nothing():
  tree = TREES[2]
  fun = jax.jit(lambda rule, judged: rule.accept(tree, judged, keys(0, 3)))
  judged = judge(tree, np.zeros((3, 3, 3), int), np.zeros((3, tree.size, 5)))
  for rules in (
    [accept.Forced(1), accept.Forced(2)],
    [accept.Typical(), accept.Typical(0.2, 0.5, 0.7)],
  ):
    before = fun._cache_size()
    for rule in rules:
      fun(rule, judged)
    assert fun._cache_size() == before + 1


def test_best_candidates_are_the_heads_own():
  logits = np.random.default_rng(12).integers(-3, 4, (3, 2, 7)) / 2
  logits = jnp.asarray(logits, jnp.float32)
  for rule in (accept.GREEDY, accept.TopK(2), TYPICAL[0], accept.Forced(1)):
    drafts = rule.propose(logits, 5, None, None)
    assert drafts.probabilities is None and not rule.uses_seen()
    want = np.argsort(-np.asarray(logits), -1, kind="stable")[..., :5]
    np.testing.assert_array_equal(drafts.tokens, want)


@pytest.mark.parametrize(
  "rule, tree, words",
  [
    (accept.TopK(0), tree_lib.chain(3), "k=0: at least the best token"),
    (accept.TopK(2, 0), tree_lib.chain(3), r"block=0 is outside 1\.\.3"),
    (accept.TopK(2, 4), tree_lib.chain(3), r"block=4 is outside 1\.\.3"),
    (accept.TopK(2, 2), tree_lib.Tree(), r"block=2 is outside 1\.\.1"),
    # No first choices stand at depth 2: two tokens can be forced, not three.
    (accept.TopK(2, 3), tree_of("0 1 10"), "block=3"),
    (accept.Forced(2), tree_of("0 2"), r"count=2 is outside 0\.\.1"),
    (accept.Forced(-1), tree_lib.chain(3), "count=-1 is outside"),
    (accept.Forced(0, accept.TopK(0)), tree_lib.chain(3), "k=0: at least"),
    (accept.Typical(epsilon=0), tree_lib.chain(3), "epsilon=0 has to be above"),
    (accept.Typical(delta=-1.0), tree_lib.chain(3), "delta=-1.0 has to be"),
    (accept.Typical(temperature=0.0), tree_lib.chain(3), "temperature=0.0 has"),
    (accept.Typical(temperature=1e-40), tree_lib.chain(3), "temperature=1e-40"),
    (accept.Typical(epsilon="1"), tree_lib.chain(3), "epsilon='1' is not a"),
    (accept.TopK(2.0), tree_lib.chain(3), "k=2.0 is not an integer"),
    (accept.TopK(2, True), tree_lib.chain(3), "block=True is not an integer"),
    (accept.Forced(1.0), tree_lib.chain(3), "count=1.0 is not an integer"),
    (
      accept.Lossless(sampling.Sampler(temperature=0)),
      tree_lib.chain(3),
      "temperature=0 has to be from 1e-06",
    ),
    (
      accept.Lossless(),
      tree_of("0 2"),
      r"without gaps; this tree has others: \[\[0\], \[2\]\]",
    ),
    (accept.Lossless(), tree_of("0 1 2 10 11 21"), "without gaps"),
    (accept.Lossless(), tree_of("1"), "without gaps"),
  ],
)
def test_what_makes_no_sense_is_refused(rule, tree, words):
  with pytest.raises(ValueError, match=words):
    rule.check(tree)


@pytest.mark.parametrize(
  "rule, tree",
  [
    (accept.GREEDY, tree_of("0 2")),
    (accept.TopK(1, 1), tree_lib.Tree()),
    (accept.TopK(5, 3), tree_of("0 1 00 10")),
    (accept.Typical(), tree_of("0 2")),
    (accept.Forced(1), tree_of("0 2")),
    (accept.Lossless(), tree_lib.Tree()),
    (
      accept.Lossless(sampling.Sampler(), False),
      tree_lib.chain(4, candidates=3),
    ),
    (accept.Lossless(), tree_of("0 1 2 00 10 11 12 120")),
  ],
)
def test_what_makes_sense_is_let_through(rule, tree):
  rule.check(tree)


@pytest.mark.parametrize(
  "rule",
  [accept.GREEDY, accept.TopK(2), *TYPICAL[:1], accept.Forced(2)],
  ids=lambda rule: type(rule).__name__,
)
def test_the_root_alone_writes_one_token(rule):
  logits = np.eye(5, dtype=np.float32)[None, [3, 1]].swapaxes(0, 1) * 99
  judged = judge(tree_lib.Tree(), np.zeros((2, 0, 1), int), logits)
  node, free = decide(rule, tree_lib.Tree(), judged)
  assert node.tolist() == [0, 0] and free.tolist() == [3, 1]
