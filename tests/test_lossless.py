"""`SpeculativeSampling`: the distribution of what it writes, enumerated.

A pass draws candidates, then accepts or rejects each by a random number. With
a few tokens every draw and every decision can be enumerated with its chance.
The distribution of the text is then known, not estimated, and has to be head
1's.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decode import accept, sampling
from mtp_jax.decode import tree as tree_lib
from tests.test_accept import ROWS, decide, keys, pvalue, tree_of, verify

# Chances in float32 are off by a few 6e-8, and so is what they add up to.
CLOSE = 1e-6


def digits(vocab, count):
  """[V^n, n]: all texts of n tokens, in the order of their numbers."""
  texts = list(itertools.product(range(vocab), repeat=count))
  return np.array(texts, int).reshape(len(texts), count)


def number(tree, vocab, tokens):
  """[rows, M]: number of the text that ends in each node of a tree.

  Args:
    tokens: [rows, D, R] candidates.
  """
  numbers = np.zeros((len(tokens), tree.size), int)
  for i in range(1, tree.size):
    token = tokens[:, tree.depth[i] - 1, tree.rank[i]]
    numbers[:, i] = numbers[:, tree.parent[i]] * vocab + token
  return numbers


probabilities = jax.jit(lambda s, logits, seen: s.probabilities(logits, seen))


class World:
  """What head 1 says after every text of up to D tokens, and what drafts do.

  Attributes:
    logits: n -> [V^n, V], head 1 after each text of n tokens.
    proposed: [D, V] the drafting heads.
    seen: [V] bool, tokens of the prompt.
  """

  def __init__(self, seed, vocab, drafts):
    rng = np.random.default_rng(seed)

    def normal(*shape):
      return rng.normal(0, 1.5, shape).astype(np.float32)

    self.vocab, self.drafts = vocab, drafts
    self.logits = [normal(vocab**n, vocab) for n in range(drafts + 1)]
    self.proposed = normal(drafts, vocab)
    self.seen = rng.random(vocab) < 0.5

  def distributions(self, sampler):
    """(head 1's, n -> [V^n, V] after each text; the drafting heads' [D, V])."""
    V, D = self.vocab, self.drafts
    held = [(digits(V, n)[..., None] == range(V)).any(1) for n in range(D + 1)]
    held = np.concatenate([*held, np.zeros((D, V), bool)]) | self.seen
    logits = np.concatenate([*self.logits, self.proposed])
    distributions = np.asarray(probabilities(sampler, logits, held), float)
    distributions /= distributions.sum(-1, keepdims=True)
    *distributions, proposed = np.split(
      distributions, np.cumsum([len(x) for x in self.logits])
    )
    return distributions, proposed

  def follows(self, sampler):
    """n -> [V^n, V^(D+1-n)]: by ordinary decoding, of the tokens to come."""
    after = [np.ones((self.vocab ** (self.drafts + 1), 1))]
    for distribution in reversed(self.distributions(sampler)[0]):
      joint = distribution[..., None] * after[-1].reshape(
        *distribution.shape, -1
      )
      after.append(joint.reshape(len(distribution), -1))
    return after[::-1]

  def verify(self, tree, tokens):
    """[rows, M, V]: head 1's logits after each node."""
    numbers = number(tree, self.vocab, tokens)
    nodes = [self.logits[d][numbers[:, i]] for i, d in enumerate(tree.depth)]
    return np.stack(nodes, 1)


def walker(tree, forgets=False):
  """`accept.walk` as `SpeculativeSampling.accept` calls it, compiled."""

  def run(sampler, drafts, logits, u, seen):
    rows = jnp.arange(len(u))

    def target(node, now):
      return sampler.probabilities(logits[rows, node], seen if forgets else now)

    return accept.walk(tree, drafts, target, u, seen)

  return jax.jit(run)


cached_walker = functools.cache(walker)


@functools.cache
def outcomes(tree, vocab):
  """Every draw and decision.

  Returns orders [P, R], which [rows, D] and decisions [rows, D, R].
  Depth d of a row draws orders[which[row, d]].
  """
  D, R = tree.max_depth, tree.width
  orders = np.array(list(itertools.permutations(range(vocab), R)))
  which, decisions = digits(len(orders), D), digits(2, D * R).reshape(-1, D, R)
  pairs = len(which), len(decisions)
  which = np.repeat(which, pairs[1], 0)
  return orders, which, np.tile(decisions, (pairs[0], 1, 1))


def successive(distribution, orders):
  """Chance [P] of each order drawn from distribution [V] without replacement.

  Where nothing that has a chance is left, any token comes, each as likely.
  """
  left = np.tile(np.asarray(distribution, float), (len(orders), 1))
  other, rows, chance = np.ones_like(left), np.arange(len(orders)), 1.0
  for token in orders.T:
    share = np.where(left.sum(-1, keepdims=True) > 0, left, other)
    chance = chance * share[rows, token] / share.sum(-1)
    left[rows, token] = other[rows, token] = 0
  assert chance.sum() == pytest.approx(1, abs=1e-12)
  return chance


def error(tree, world, rule, *, walk=None, believed=None):
  """Largest difference of D+1 written tokens' distribution from head 1's.

  What a pass leaves unwritten of them is appended by ordinary decoding.

  Args:
    tree, world, rule: what decodes.
    walk: instead of `walker(tree)`.
    believed: sampler by which the walk takes drafts to be drawn.
  """
  V, D = world.vocab, world.drafts
  rule.check(tree)
  orders, which, decisions = outcomes(tree, V)
  _, q = world.distributions(rule.sampler)
  if rule.sample_drafts:
    chances = [successive(distribution, orders) for distribution in q]
    _, q = world.distributions(believed or rule.sampler)
    q = jnp.tile(q.astype(np.float32), (len(which), 1, 1))
  else:
    best = np.argsort(-q, -1, kind="stable")[:, None, : tree.width]
    chances, q = (orders == best).all(-1).astype(float), None
  node, p, asked = (walk or cached_walker(tree))(
    rule.sampler,
    accept.Drafts(jnp.asarray(orders[which]), q),
    world.verify(tree, orders[which]),
    decisions.astype(np.float32),
    jnp.tile(world.seen, (len(which), 1)),
  )
  node, p, asked = np.asarray(node), *(np.asarray(x, float) for x in (p, asked))
  # u = 0 accepts whatever can be accepted, u = 1 rejects whatever can be
  # rejected. A candidate that is not asked counts half with each, once in all.
  weight = np.where(decisions == 0, asked, 1 - asked)
  weight = np.where(np.isnan(asked), 0.5, weight).prod((1, 2))
  for d, chance in enumerate(chances):
    weight = weight * chance[which[:, d]]
  assert weight.sum() == pytest.approx(1, abs=CLOSE)
  text = number(tree, V, orders[which])[np.arange(len(node)), node]
  follows, got = world.follows(rule.sampler), 0
  for depth in range(D + 1):
    here = tree.depth[node] == depth
    distribution = np.zeros((V**depth, V))
    np.add.at(distribution, text[here], weight[here, None] * p[here])
    distribution = distribution[..., None] * follows[depth + 1].reshape(
      *distribution.shape, -1
    )
    got = got + distribution.reshape(1, -1)
  return abs(got - follows[0]).max()


SMALL = {
  "chain of 1": (tree_lib.chain(2), 5),
  "chain of 2": (tree_lib.chain(3), 4),
  "chain of 3": (tree_lib.chain(4), 3),
  "more candidates than nodes": (tree_lib.chain(3, candidates=2), 3),
  "two siblings": (tree_of("0 1"), 4),
  "every token a sibling": (tree_of("0 1 2"), 3),
  "four of five": (tree_of("0 1 2 3"), 5),
  "two levels": (tree_of("0 1 00 01 10"), 4),
  "leaves between": (tree_of("0 1 2 00 20 21 22"), 3),
  "three levels": (tree_of("0 1 00 01 10 010 011 100"), 3),
}


def sampler(**numbers):
  """All filters on, so that all numbers share a program; others do nothing."""
  off = {
    "temperature": 1.0,
    "top_k": 10,
    "top_p": 1.0,
    "min_p": 0.0,
    "penalty": 1.0,
  }
  return sampling.Sampler(**(off | numbers))


SAMPLERS = [
  sampler(),
  sampler(temperature=0.3),
  sampler(temperature=3.0),
  sampler(top_k=1),  # fewer tokens than siblings
  sampler(top_k=2),
  sampler(top_p=0.6),
  sampler(min_p=0.3),
  sampler(penalty=2.5),
  sampler(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05, penalty=1.3),
]


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "best"])
@pytest.mark.parametrize("name", SMALL)
def test_the_text_has_head_1s_distribution(name, drawn):
  tree, vocab = SMALL[name]
  for seed, one in enumerate(SAMPLERS):
    world = World(seed, vocab, tree.max_depth)
    assert error(tree, world, accept.SpeculativeSampling(one, drawn)) < CLOSE, (
      one
    )


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "best"])
def test_drafts_that_are_right_impossible_or_all_but_certain(drawn):
  tree, vocab = SMALL["two levels"]
  for one in (sampler(), sampler(top_k=3, penalty=1.7)):
    rule = accept.SpeculativeSampling(one, drawn)
    world = World(11, vocab, tree.max_depth)
    world.logits = [x * 0 + world.proposed[:1] for x in world.logits]
    world.proposed[:] = world.proposed[0]
    assert error(tree, world, rule) < CLOSE
    world = World(12, vocab, tree.max_depth)
    for x in world.logits:
      x[:, [0, 2]] = -np.inf
    world.proposed[:, [1, 3]] = -np.inf  # no draft can ever be accepted
    assert error(tree, world, rule) < CLOSE
    world.proposed[0] = [-np.inf, 0, 0, -np.inf]  # one of two can
    assert error(tree, world, rule) < CLOSE
    world = World(13, vocab, tree.max_depth)
    world.proposed *= 20
    assert error(tree, world, rule) < CLOSE
    world = World(14, vocab, tree.max_depth)
    world.logits = [x * 20 for x in world.logits]
    assert error(tree, world, rule) < CLOSE


@pytest.mark.parametrize(
  "one", [sampling.Sampler(), sampling.Sampler(temperature=0.5, top_k=2)]
)
def test_filters_left_out_and_nothing_seen(one):
  tree, vocab = SMALL["two levels"]

  @jax.jit
  def walk(one, drafts, logits, u, seen):
    def target(node, seen):
      assert seen is None
      return one.probabilities(logits[jnp.arange(len(u)), node])

    return accept.walk(tree, drafts, target, u)

  world = World(15, vocab, tree.max_depth)
  assert error(tree, world, accept.SpeculativeSampling(one), walk=walk) < CLOSE


# A wrong rule shows: the enumeration can fail.
def keep_p(monkeypatch):
  """After a rejection the distribution stays head 1's."""
  monkeypatch.setattr(accept, "_residual", lambda p, q, x: p)


def keep_q(monkeypatch):
  """A fallen candidate stays among what its siblings are drawn from."""
  right = accept._normalise
  monkeypatch.setattr(
    accept, "_residual", lambda p, q, x: right(jnp.maximum(p - q, 0), p)
  )
  monkeypatch.setattr(accept, "_normalise", lambda p, otherwise: otherwise)


def leave_q_short(monkeypatch):
  """Without the fallen candidate q does not sum to 1."""
  keep_q(monkeypatch)
  monkeypatch.setattr(accept, "_normalise", lambda p, otherwise: p)


def leave_p_short(monkeypatch):
  """What is left of p does not sum to 1; a draw would not show it."""
  monkeypatch.setattr(
    accept, "_residual", lambda p, q, x: jnp.maximum(p - q, 0)
  )


@pytest.mark.parametrize(
  "bug, trees",
  [
    (keep_p, ["chain of 1", "chain of 3", "two levels"]),
    (keep_q, ["two siblings", "two levels"]),
    (leave_q_short, ["two siblings", "two levels"]),
    (leave_p_short, ["two siblings", "two levels"]),
  ],
)
def test_a_wrong_residual_shows(bug, trees, monkeypatch):
  bug(monkeypatch)
  for name in trees:
    tree, vocab = SMALL[name]
    world = World(1, vocab, tree.max_depth)
    rule = accept.SpeculativeSampling(sampling.Sampler())
    assert error(tree, world, rule, walk=walker(tree)) > 1e-3, name


@pytest.mark.parametrize("name", ["chain of 1", "two levels"])
def test_drafts_measured_at_another_temperature_show(name):
  tree, vocab = SMALL[name]
  world = World(1, vocab, tree.max_depth)
  rule = accept.SpeculativeSampling(sampling.Sampler(temperature=0.8))
  believed = sampling.Sampler(temperature=1.0)
  assert error(tree, world, rule, believed=believed) > 1e-3


def test_a_text_whose_drafts_are_not_seen_shows():
  tree, vocab = SMALL["chain of 2"]
  world = World(1, vocab, tree.max_depth)
  world.seen[:] = False
  rule = accept.SpeculativeSampling(sampling.Sampler(penalty=2.5))
  assert error(tree, world, rule, walk=walker(tree, forgets=True)) > 1e-3


def write_two(tree, world, rule, seed):
  """[V, V] counts of the first two tokens in ROWS texts."""
  V = world.vocab

  @jax.jit
  def propose(rule, drafting):
    proposed = jnp.tile(world.proposed, (ROWS, 1, 1))
    seen = jnp.tile(world.seen, (ROWS, 1))
    return rule.propose(proposed, tree.width, seen, drafting)

  @jax.jit
  def decide(rule, verification, accepting):
    return rule.accept(tree, verification, accepting)

  both = keys(seed, 2 * ROWS)
  drafts = propose(rule, both[:ROWS])
  tokens = np.asarray(drafts.tokens)
  verification = verify(tree, tokens, world.verify(tree, tokens), drafts)
  verification = verification._replace(seen=jnp.tile(world.seen, (ROWS, 1)))
  node, bonus = map(np.asarray, decide(rule, verification, both[ROWS:]))
  depth, rows = tree.depth[node], np.arange(ROWS)
  window = np.asarray(verification.tokens)
  # Of texts with one token only the second comes by ordinary decoding.
  distribution = world.follows(rule.sampler)[1].reshape(V, V, -1).sum(-1)[bonus]
  draw = np.random.default_rng(seed).random((ROWS, 1))
  ordinary = np.minimum((distribution.cumsum(1) < draw).sum(1), V - 1)
  first = np.where(depth == 0, bonus, window[rows, tree.path_nodes[node, 1]])
  second = np.where(depth == 1, bonus, window[rows, tree.path_nodes[node, 2]])
  second = np.where(depth == 0, ordinary, second)
  assert set(depth) == {0, 1, 2}
  counts = np.zeros((V, V))
  np.add.at(counts, (first, second), 1)
  return counts


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "best"])
def test_texts_of_100_000_rows_have_head_1s_distribution(drawn, monkeypatch):
  tree, vocab = tree_of("0 1 00 10 11"), 4
  world = World(2, vocab, tree.max_depth)
  one = sampling.Sampler(temperature=0.8, penalty=1.3)
  rule = accept.SpeculativeSampling(one, drawn)
  counts = write_two(tree, world, rule, 0)

  def distribution(one):
    return world.follows(one)[0].reshape(vocab, vocab, -1).sum(-1)

  assert pvalue(counts, distribution(one)) > 1e-3
  # So many rows tell temperatures that differ by a twentieth, and a residual
  # that is head 1's whole distribution.
  near = sampling.Sampler(temperature=0.84, penalty=1.3)
  assert pvalue(counts, distribution(near)) < 1e-6
  keep_p(monkeypatch)
  assert pvalue(write_two(tree, world, rule, 0), distribution(one)) < 1e-6


def test_a_rows_text_depends_on_its_own_key_alone():
  tree, V, B = tree_of("0 1 00 01 10"), 11, 7
  rng = np.random.default_rng(5)
  proposed = rng.normal(size=(B, 2, V)).astype(np.float32)
  logits = rng.normal(size=(B, tree.size, V)).astype(np.float32)
  seen = rng.random((B, V)) < 0.4
  rule = accept.SpeculativeSampling(
    sampling.Sampler(temperature=0.7, penalty=1.3)
  )
  mine = keys(6, 2 * B)

  @jax.jit
  def one_pass(proposed, logits, seen, drafting, accepting):
    drafts = rule.propose(proposed, tree.width, seen, drafting)
    verification = verify(tree, drafts.tokens, logits, drafts)._replace(
      seen=seen
    )
    return drafts.tokens, *rule.accept(tree, verification, accepting)

  def run(rows, keys_of):
    return [
      np.asarray(x)
      for x in one_pass(
        *(jnp.asarray(x[rows]) for x in (proposed, logits, seen)),
        mine[keys_of],
        mine[B + keys_of],
      )
    ]

  every = np.arange(B)
  whole = run(every, every)
  assert len(set(whole[1].tolist())) > 1
  order = rng.permutation(B)
  for a, b in zip(run(order, order), whole, strict=True):
    np.testing.assert_array_equal(a, b[order])
  for i in range(B):
    for a, b in zip(
      run(every[i : i + 1], every[i : i + 1]), whole, strict=True
    ):
      np.testing.assert_array_equal(a[0], b[i])
  # And on it: the other rows' keys give other texts.
  others = run(every, np.roll(every, 1))
  assert any((a != b).any() for a, b in zip(others[1:], whole[1:], strict=True))


def test_lossless_candidates_come_from_the_filtered_distribution():
  rng = np.random.default_rng(13)
  logits = jnp.asarray(rng.normal(size=(3, 2, 7)), jnp.float32)
  seen = rng.random((3, 7)) < 0.5
  one = sampler(temperature=0.7, top_k=4, penalty=3.0)
  distribution = probabilities(one, logits, jnp.asarray(seen)[:, None])
  propose = jax.jit(lambda rule: rule.propose(logits, 3, seen, keys(0, 3)))
  drawn = propose(accept.SpeculativeSampling(one))
  # The two programs may round otherwise.
  np.testing.assert_allclose(drawn.probabilities, distribution, rtol=1e-6)
  chances = np.take_along_axis(
    np.asarray(distribution), np.asarray(drawn.tokens), -1
  )
  assert (chances > 0).all()
  best = propose(accept.SpeculativeSampling(one, False))
  assert best.probabilities is None
  want = np.argsort(-np.asarray(distribution), -1, kind="stable")[..., :3]
  np.testing.assert_array_equal(best.tokens, want)
  # The penalty moves them: they are not the heads' own.
  assert (want != np.argsort(-np.asarray(logits), -1)[..., :3]).any()


def test_siblings_with_a_gap_would_not_be_lossless(monkeypatch):
  """Why they are refused."""
  tree = tree_of("0 1 00 11")
  rule = accept.SpeculativeSampling(sampling.Sampler())
  monkeypatch.setattr(accept.SpeculativeSampling, "check", lambda *_: None)
  assert error(tree, World(3, 4, 2), rule) > 1e-3


def test_the_root_alone_draws_from_head_1():
  distribution = np.array([0.5, 0.2, 0.0, 0.3])
  logits = np.log(np.maximum(distribution, 1e-45)).astype(np.float32)
  logits[distribution == 0] = -np.inf
  for drawn in (True, False):
    verification = verify(
      tree_lib.Tree(),
      np.zeros((ROWS, 0, 1), int),
      np.tile(logits, (ROWS, 1, 1)),
    )
    rule = accept.SpeculativeSampling(sampling.Sampler(), drawn)
    node, bonus = decide(rule, tree_lib.Tree(), verification)
    assert not node.any()
    assert pvalue(np.bincount(bonus, minlength=4), distribution) > 1e-3
