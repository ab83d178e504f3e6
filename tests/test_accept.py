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


def pvalue(counts, distribution):
  """Of a chi-square test; what has no chance must not occur."""
  counts, distribution = np.ravel(counts), np.ravel(distribution)
  assert not counts[distribution == 0].any()
  counts, distribution = (
    counts[distribution > 0],
    distribution[distribution > 0],
  )
  return stats.chisquare(
    counts, distribution / distribution.sum() * counts.sum()
  ).pvalue


def verify(tree, tokens, logits, drafts=None):
  """What a rule decides from, of candidates [B, D, R]."""
  root = jnp.zeros((len(logits), 1), jnp.int32)
  window = jnp.concatenate(
    [root, jnp.asarray(tokens)[:, tree.depth[1:] - 1, tree.rank[1:]]], 1
  )
  logits = jnp.asarray(logits)
  return accept.Verification(window, logits, logits.argmax(-1), drafts, None)


@functools.partial(jax.jit, static_argnames="tree")
def decide(rule, tree, verification, seed=0):
  node, bonus = rule.accept(
    tree, verification, keys(seed, len(verification.tokens))
  )
  assert node.dtype == jnp.int32 and bonus.dtype == jnp.int32
  return node, bonus


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
  shape = rows, tree.max_depth, vocab
  return rng.permuted(np.tile(np.arange(vocab), (*shape[:2], 1)), axis=-1)[
    ..., : tree.width
  ]


def deepest_by_hand(tree, accepted, score=None):
  """Index of the node; `accepted` and `score` tell of nodes by their paths."""
  nodes = [(), *tree.paths]
  whole = [
    (len(node), score(node) if score else 0, -i)
    for i, node in enumerate(nodes)
    if all(accepted(node[:d]) for d in range(1, len(node) + 1))
  ]
  return -max(whole)[2]


def expect(rule, tree, tokens, logits, accepted, bonus):
  """Compares a rule with `accepted(row, token, logits, node)` and `bonus(row)`.

  Returns the depths.
  """
  verification = verify(tree, tokens, logits)
  node, token = map(np.asarray, decide(rule, tree, verification))
  number = {path: i for i, path in enumerate([(), *tree.paths])}
  for b in range(len(logits)):

    def one(path, b=b):
      said = logits[b, number[path[:-1]]].tolist()
      return accepted(path, tokens[b, len(path) - 1, path[-1]], said)

    assert node[b] == deepest_by_hand(tree, one)
    assert token[b] == bonus(logits[b, node[b]].tolist())
  return tree.depth[node]


def first_best(logits):
  return logits.index(max(logits))


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_greedy_against_a_walk(tree):
  rng = np.random.default_rng(0)
  B, V = 211, 4
  tokens = candidates(rng, B, tree, V)
  logits = rng.integers(-2, 3, (B, tree.size, V)).astype(np.float32)
  node, bonus = decide(accept.GREEDY, tree, verify(tree, tokens, logits))
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
    assert nodes[node[b]] == path and bonus[b] == best
  assert set(tree.depth[node]) == set(range(tree.max_depth + 1))


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_deepest_against_loops(tree):
  rng = np.random.default_rng(1)
  B = 211
  accepted = rng.random((B, tree.size)) < 0.7  # the root's does not count
  score = rng.integers(-5, 1, (B, tree.size)).astype(np.float32)
  by_number = jax.jit(accept.deepest, static_argnums=0)
  first = by_number(tree, jnp.asarray(accepted))
  best = by_number(tree, jnp.asarray(accepted), jnp.asarray(score))
  assert first.dtype == best.dtype == jnp.int32
  number = {path: i for i, path in enumerate([(), *tree.paths])}
  for b in range(B):

    def accepted_here(path, b=b):
      return accepted[b, number[path]]

    def score_here(path, b=b):
      return score[b, number[path]]

    assert first[b] == deepest_by_hand(tree, accepted_here)
    assert best[b] == deepest_by_hand(tree, accepted_here, score_here)
  if not tree.is_chain:
    assert (first != best).any()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("tree", TREES[1:], ids=range(len(TREES[1:])))
def test_top_k_against_loops(tree, k):
  rng = np.random.default_rng(2)
  B, V = 101, 7
  tokens = candidates(rng, B, tree, V)
  logits = rng.integers(-9, 10, (B, tree.size, V)).astype(np.float32)

  def accepted(path, token, said):
    return said[token] >= sorted(said, reverse=True)[k - 1]

  depths = expect(accept.TopK(k), tree, tokens, logits, accepted, first_best)
  assert len(set(depths)) >= 3


def test_top_1_is_greedy():
  tree, rng = tree_lib.chain(4), np.random.default_rng(3)
  tokens = candidates(rng, 211, tree, 3)
  logits = rng.normal(size=(211, tree.size, 3)).astype(np.float32)
  verification = verify(tree, tokens, logits)
  one, other = (
    decide(r, tree, verification) for r in (accept.TopK(1), accept.GREEDY)
  )
  np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("paths", ["0 00 000", "0 1 2 00 01 10 20 000 001 200"])
def test_a_block_is_accepted_unseen(paths):
  tree, rng = tree_of(paths), np.random.default_rng(4)
  B, V = 101, 7
  tokens = candidates(rng, B, tree, V)
  logits = rng.normal(size=(B, tree.size, V)).astype(np.float32)
  for block in range(1, tree.heads + 1):
    rule = accept.TopK(2, block)
    rule.check(tree)

    def accepted(path, token, said, block=block):
      forced = not any(path) and len(path) < block
      return forced or said[token] >= sorted(said)[-2]

    depths = expect(rule, tree, tokens, logits, accepted, first_best)
    assert min(depths) == block - 1  # written are one more
    assert block == tree.heads or max(depths) >= block


def typical_by_hand(rule, tree, tokens, logits):
  """(node, {token: chance of the bonus one}, margin) of one row, in float64."""
  x = logits.astype(float) / rule.temperature
  p = np.exp(x - x.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
  least = np.minimum(rule.epsilon, rule.delta * np.exp(-entropy))
  number = {path: i for i, path in enumerate([(), *tree.paths])}

  def share(path):
    token = tokens[len(path) - 1, path[-1]]
    return p[number[path[:-1]], token]

  def accepted(path):
    return share(path) > least[number[path[:-1]]]

  def score(path):
    return math.prod(share(path[:d]) for d in range(1, len(path) + 1))

  node = deepest_by_hand(tree, accepted, score)
  bonus = {v: s for v, s in enumerate(p[node]) if s > least[node]}
  bonus = bonus or {int(p[node].argmax()): 1.0}
  return node, bonus, abs(p - least[:, None]).min()


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
  node, bonus = decide(rule, tree, verify(tree, tokens, logits))
  later = ties = 0
  for b in range(B):
    want, distribution, margin = typical_by_hand(
      rule, tree, tokens[b], logits[b]
    )
    assert margin > 1e-6  # shares in float32 are off by a few 6e-8
    assert node[b] == want and int(bonus[b]) in distribution
    later += tree.depth[want] > 0
    ties += want > np.flatnonzero(tree.depth == tree.depth[want])[0]
  assert later or not tree.max_depth
  assert ties or tree.is_chain or rule.epsilon > 0.5


def test_typical_draws_the_bonus_token_from_what_would_be_accepted():
  tree, V = tree_of("0 1"), 5
  rng = np.random.default_rng(9)
  rows = 11
  tokens = candidates(rng, rows, tree, V)
  logits = rng.normal(0, 1.5, (rows, tree.size, V)).astype(np.float32)
  told = 0
  for rule in TYPICAL:
    times = ROWS // rows
    verification = verify(
      tree, np.repeat(tokens, times, 0), np.repeat(logits, times, 0)
    )
    _, bonus = decide(rule, tree, verification)
    for b, drawn in enumerate(np.asarray(bonus).reshape(rows, times)):
      _, distribution, _ = typical_by_hand(rule, tree, tokens[b], logits[b])
      assert set(drawn.tolist()) == set(
        distribution
      )  # none rarer than one in fifty
      assert min(distribution.values()) / sum(distribution.values()) > 0.02
      if len(distribution) > 1:
        counts = np.bincount(drawn, minlength=V)
        distribution = np.array([distribution.get(v, 0) for v in range(V)])
        assert pvalue(counts, distribution) > 1e-4  # of some twenty of these
        told += (
          pvalue(counts, np.where(distribution > 0, distribution + 0.05, 0))
          < 1e-6
        )
  assert told > 5


def test_typical_takes_the_likeliest_of_paths_though_another_is_impossible():
  """Like the padding ids of a vocabulary, which have no chance at all."""
  tree = tree_of("0 1 2")
  logits = np.zeros((1, 4, 5), np.float32)
  logits[0, 0] = [-np.inf, 1, 2, 0, 0]
  verification = verify(tree, np.array([[[0, 1, 2]]]), logits)
  node, _ = decide(accept.Typical(), tree, verification)
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
    node, bonus = decide(
      accept.Forced(count), tree, verify(tree, tokens, logits)
    )
    want = nodes.index((0,) * min(count, spine))
    assert node.tolist() == [want] * B
    _, token = decide(accept.GREEDY, tree, verify(tree, tokens, logits))
    assert bonus.tolist() == token.tolist()


def test_forced_drafts_cost_what_their_rule_does():
  tree, rng = tree_lib.chain(3), np.random.default_rng(15)
  logits = jnp.asarray(rng.normal(size=(5, 3, 7)), jnp.float32)
  rule = accept.SpeculativeSampling(
    sampling.Sampler(temperature=0.8, penalty=1.5)
  )
  forced = accept.Forced(1, rule)
  assert forced.uses_seen() and rule.uses_seen()
  seen = jnp.zeros((5, 7), bool)
  drafts = forced.propose(logits[:, 1:], 1, seen, keys(0, 5))
  for got, want in zip(
    drafts, rule.propose(logits[:, 1:], 1, seen, keys(0, 5)), strict=True
  ):
    np.testing.assert_array_equal(got, want)
  window = jnp.pad(drafts.tokens[..., 0], ((0, 0), (1, 0)))
  verification = accept.Verification(
    window, logits, logits.argmax(-1), drafts, seen
  )
  node, bonus = forced.accept(tree, verification, keys(1, 5))
  assert node.tolist() == [1] * 5
  want = rule.accept(tree, verification, keys(1, 5))[1]
  np.testing.assert_array_equal(bonus, want)
  assert (bonus != verification.best[:, 1]).any()  # drawn


def test_numbers_compile_nothing():
  tree = TREES[2]
  fun = jax.jit(
    lambda rule, verification: rule.accept(tree, verification, keys(0, 3))
  )
  verification = verify(
    tree, np.zeros((3, 3, 3), int), np.zeros((3, tree.size, 5))
  )
  for rules in (
    [accept.Forced(1), accept.Forced(2)],
    [accept.Typical(), accept.Typical(0.2, 0.5, 0.7)],
  ):
    before = fun._cache_size()
    for rule in rules:
      fun(rule, verification)
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
      accept.SpeculativeSampling(sampling.Sampler(temperature=0)),
      tree_lib.chain(3),
      "temperature=0 has to be from 1e-06",
    ),
    (
      accept.SpeculativeSampling(),
      tree_of("0 2"),
      r"without gaps; this tree has others: \[\[0\], \[2\]\]",
    ),
    (accept.SpeculativeSampling(), tree_of("0 1 2 10 11 21"), "without gaps"),
    (accept.SpeculativeSampling(), tree_of("1"), "without gaps"),
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
    (accept.SpeculativeSampling(), tree_lib.Tree()),
    (
      accept.SpeculativeSampling(sampling.Sampler(), False),
      tree_lib.chain(4, candidates=3),
    ),
    (accept.SpeculativeSampling(), tree_of("0 1 2 00 10 11 12 120")),
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
  verification = verify(tree_lib.Tree(), np.zeros((2, 0, 1), int), logits)
  node, bonus = decide(rule, tree_lib.Tree(), verification)
  assert node.tolist() == [0, 0] and bonus.tolist() == [3, 1]


# --- The walk down a tree -----------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def walk_by_depth(tree, tokens, q, p, u):
  """`accept.walk` where head 1's distribution is p [B, D+1, V] by depth."""

  def target(node, _):
    return p[jnp.arange(len(u)), jnp.asarray(tree.depth)[node]]

  return accept.walk(tree, accept.Drafts(tokens, q), target, u)


BELOW_1 = np.nextafter(np.float32(1), np.float32(0))


def test_a_draft_that_is_as_likely_as_it_is_right_is_always_accepted():
  p = np.random.default_rng(0).dirichlet(np.ones(5), (7, 3)).astype(np.float32)
  tokens = np.tile([[[0], [1]]], (7, 1, 1))
  u = np.full((7, 2, 1), BELOW_1)
  node, distribution, chances = walk_by_depth(
    tree_lib.chain(3), tokens, p[:, :2], p, u
  )
  assert node.tolist() == [2] * 7
  np.testing.assert_array_equal(chances, np.ones((7, 2, 1)))
  np.testing.assert_array_equal(distribution, p[:, 2])


def test_the_draw_decides_by_the_chance():
  """Just below it a draft is accepted, at it rejected."""
  p = np.array([[[0.25, 0.125, 0.625], [0.5, 0.0, 0.5]]], np.float32)
  q = np.array([[[0.5, 0.25, 0.25]]], np.float32)
  # A rejected draft leaves max(p - q, 0), here the last token alone.
  for u, want, left in ((0.5, 0, [0, 0, 1]), (BELOW_1 / 2, 1, [0.5, 0, 0.5])):
    node, distribution, chances = walk_by_depth(
      tree_lib.chain(2), np.zeros((1, 1, 1), int), q, p, np.full((1, 1, 1), u)
    )
    assert node.tolist() == [want] and distribution.tolist() == [left]
    assert chances.tolist() == [[[0.5]]]
