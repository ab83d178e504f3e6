"""Trees: arrays against loops over the paths, the built one against all."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mtp_jax.decode import tree as tree_lib

# Medusa's mc_sim_7b_63 in its file's order, a digit per rank.
MC_SIM_7B_63 = (
  "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 "
  "8 9 100 020 12 003 40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 "
  "14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)


@st.composite
def paths(draw, nodes=13, width=5):
  """Prefix-closed paths, gaps between siblings included, in any order."""
  known = [()]
  for _ in range(draw(st.integers(0, nodes))):
    child = (*draw(st.sampled_from(known)), draw(st.integers(0, width - 1)))
    if child not in known:
      known.append(child)
  return draw(st.permutations(known[1:]))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(paths())
def test_arrays_against_loops_over_the_paths(named):
  tree = tree_lib.from_paths(named)
  nodes = [(), *tree.paths]
  assert sorted(nodes) == sorted([(), *named])
  assert nodes == sorted(nodes, key=lambda p: (len(p), p))
  drafts = max(len(p) for p in nodes)
  width = max([r for p in nodes for r in p], default=0) + 1
  assert (tree.size, tree.max_depth) == (len(named) + 1, drafts)
  assert (tree.heads, tree.width) == (drafts + 1, width)
  assert tree.is_chain == all(r == 0 for p in nodes for r in p)
  for name in ("depth", "rank", "parent", "path_nodes", "child"):
    assert getattr(tree, name).dtype == np.int32
  assert tree.path_nodes.shape == (tree.size, drafts + 1)
  assert tree.child.shape == (tree.size, width)
  assert tree.ancestor_mask.shape == (tree.size, tree.size)
  for i, node in enumerate(nodes):
    assert tree.depth[i] == len(node)
    assert tree.rank[i] == (node[-1] if node else 0)
    assert nodes[tree.parent[i]] == node[:-1]
    for d in range(drafts + 1):
      assert nodes[tree.path_nodes[i, d]] == node[:d]
    for j, other in enumerate(nodes):
      assert tree.ancestor_mask[i, j] == (other == node[: len(other)])
    for r in range(width):
      child = tree.child[i, r]
      assert (child == -1) == ((*node, r) not in nodes)
      assert child == -1 or nodes[child] == (*node, r)


def test_from_paths_reads_any_order_and_any_integers():
  want = ((0,), (2,), (0, 1), (2, 0), (2, 0, 3))
  assert tree_lib.from_paths(reversed(want)).paths == want
  arrays = [np.array(p, np.int64) for p in want]
  got = tree_lib.from_paths(arrays).paths
  assert got == want and all(type(r) is int for p in got for r in p)
  assert tree_lib.from_paths([]).paths == ()


@pytest.mark.parametrize(
  "wrong, words",
  [
    ([[0], [0, -1]], r"path \[0, -1\] names no draft: ranks count from 0"),
    ([[0], []], r"path \[\] names no draft"),
    ([[0], [1], [0]], r"path \[0\] is given twice"),
    ([[0], [1, 0]], r"path \[1, 0\] hangs in the air: add its parent"),
    ([[0, 0, 0], [0]], r"path \[0, 0, 0\] hangs in the air"),
  ],
)
def test_what_is_no_tree_is_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    tree_lib.from_paths(wrong)


def test_chains():
  for heads in (1, 2, 5):
    tree = tree_lib.chain(heads)
    assert tree.is_chain and (tree.size, tree.width) == (heads, 1)
    assert tree.heads == heads and tree.max_depth == heads - 1
    assert tree.parent.tolist() == [0, *range(heads - 1)]
    assert tree.depth.tolist() == list(range(heads))
    np.testing.assert_array_equal(tree.ancestor_mask, np.tri(heads, dtype=bool))
  assert tree_lib.chain(1) == tree_lib.Tree() == tree_lib.from_paths([])
  assert tree_lib.chain(3) == tree_lib.from_paths([[0, 0], [0]])
  assert not tree_lib.from_paths([[1]]).is_chain
  for heads in (0, -2):
    with pytest.raises(ValueError, match=f"heads={heads}: head 1 at least"):
      tree_lib.chain(heads)


def test_heads_may_be_asked_for_more_candidates_than_the_tree_reads():
  tree = tree_lib.chain(4, candidates=3)
  plain = tree_lib.chain(4)
  assert tree != plain and tree.paths == plain.paths
  assert (plain.width, tree.width) == (1, 3)
  assert tree.child.shape == (4, 3)
  np.testing.assert_array_equal(tree.child[:, :1], plain.child)
  assert (tree.child[:, 1:] == -1).all()
  assert tree_lib.Tree(((0,), (4,)), candidates=3).width == 5
  assert tree_lib.Tree(candidates=3).width == 3


def test_equal_trees_share_one_program():
  sums = jax.jit(
    lambda x, tree: x @ jnp.asarray(tree.ancestor_mask, x.dtype),
    static_argnames="tree",
  )
  named = [[0], [1], [0, 0], [1, 2]]
  tree, twin = tree_lib.from_paths(named), tree_lib.from_paths(named[::-1])
  other = tree_lib.from_paths([*named[:3], [1, 1]])
  assert tree is not twin and tree == twin and hash(tree) == hash(twin)
  assert tree != other and len({tree, twin, other}) == 2
  x = jnp.arange(10.0).reshape(2, 5)
  for one, programs in ((tree, 1), (twin, 1), (other, 2)):
    np.testing.assert_array_equal(
      sums(x, one), np.asarray(x) @ one.ancestor_mask
    )
    assert sums._cache_size() == programs


def test_medusas_tree():
  named = [[int(r) for r in path] for path in MC_SIM_7B_63.split()]
  tree = tree_lib.from_paths(named)
  assert len(named) == 63 and tree.size == 64
  assert np.bincount(tree.depth).tolist() == [1, 10, 28, 23, 2]
  assert (tree.width, tree.heads) == (10, 5)
  assert (tree.child < 0).all(1).sum() == 42  # leaves
  assert tree.paths[:11] == (*((r,) for r in range(10)), (0, 0))
  assert tree.paths[-2:] == ((0, 0, 0, 0), (0, 0, 0, 1))


# --- The tree that accepts most ---------------------------------------------


@functools.cache
def every_tree(drafts, width, size):
  """All trees of a size, gaps between siblings included."""
  trees = {frozenset()}
  for _ in range(size - 1):
    trees = {
      tree | {(*parent, rank)}
      for tree in trees
      for parent in ((), *tree)
      for rank in range(width)
      if len(parent) < drafts and (*parent, rank) not in tree
    }
  return [tree_lib.from_paths(tree) for tree in trees]


def table(rng, drafts, width):
  """[drafts, width] chances, rows falling and of sums below 1."""
  rows = -np.sort(-rng.dirichlet(np.full(width + 1, 0.7), drafts)[:, 1:])
  return rows * rng.uniform(0.3, 1, (drafts, 1))


@pytest.mark.parametrize(
  "drafts, width, size, count",
  # Known counts: two of five; the chain; 42 binary trees of five nodes; one,
  # two or three of three with as many of their 3, 6 or 9 children as are
  # left, 3 + 45 + 9; 55 ternary trees of four nodes.
  [(1, 5, 3, 10), (3, 1, 4, 1), (4, 2, 5, 42), (2, 3, 5, 57), (3, 3, 4, 55)],
)
def test_the_built_tree_is_the_best_of_all(drafts, width, size, count):
  trees = every_tree(drafts, width, size)
  assert len(trees) == count
  rng = np.random.default_rng(size)
  for _ in range(23):
    acceptance = table(rng, drafts, width)
    built = tree_lib.build(acceptance, size)
    assert built.size == size
    values = [tree_lib.expected(tree, acceptance) for tree in trees]
    # float64 sums of a few numbers below 1
    assert tree_lib.expected(built, acceptance) == pytest.approx(
      max(values), abs=1e-12
    )
    if count > 1:  # or any tree would do
      assert min(values) < max(values) - 1e-3


def test_expected_counts_what_stands_in_simulated_passes():
  """Each true token's rank drawn by the table: how deep the tree follows."""
  acceptance = np.array([[0.5, 0.3, 0.1], [0.6, 0.2, 0.0], [0.3, 0.3, 0.3]])
  tree = tree_lib.from_paths(
    [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 2], [1, 0, 1]]
  )
  rng = np.random.default_rng(0)
  passes, total = 20_000, 0
  for ranks in zip(
    *(rng.choice(4, passes, p=[*row, 1 - row.sum()]) for row in acceptance),
    strict=True,
  ):
    stands = 0
    while stands < 3 and ranks[: stands + 1] in tree.paths:
      stands += 1
    total += stands + 1
  # Of tokens between 1 and 4 the mean of 20,000 has an error below 0.011.
  assert tree_lib.expected(tree, acceptance) == pytest.approx(
    total / passes, abs=4 * 0.011
  )


def test_expected_of_a_chain():
  acceptance = table(np.random.default_rng(1), 4, 3)
  for heads in (1, 2, 3, 5):
    want = 1 + np.cumprod(acceptance[: heads - 1, 0]).sum()
    got = tree_lib.expected(tree_lib.chain(heads), acceptance)
    assert got == pytest.approx(want, rel=1e-12)


def test_expected_counts_what_the_table_lacks_as_0():
  tree = tree_lib.from_paths([[0], [1], [3], [0, 0], [0, 0, 0]])
  assert tree_lib.expected(tree, np.array([[0.5, 0.25]])) == 1.75
  assert tree_lib.expected(tree, np.array([[0.5], [0.5]])) == 1.75
  assert tree_lib.expected(tree_lib.Tree(), np.zeros((0, 1))) == 1


def test_a_size_beyond_the_table_takes_all_that_has_a_chance():
  acceptance = np.array([[0.5, 0.25, 0.0], [0.5, 0.5, 0.0]])
  want = [[0], [1], [0, 0], [0, 1], [1, 0], [1, 1]]
  for size in (7, 8, 10**6):
    assert tree_lib.build(acceptance, size) == tree_lib.from_paths(want)
  assert tree_lib.build(acceptance, 1) == tree_lib.Tree()
  assert tree_lib.build(np.zeros((0, 3)), 5) == tree_lib.Tree()
  assert tree_lib.build(np.zeros((2, 3)), 5) == tree_lib.Tree()


def test_siblings_are_built_without_gaps_whatever_the_table():
  rng = np.random.default_rng(3)
  for _ in range(53):
    acceptance = rng.dirichlet(np.full(6, 0.5), 3)[:, 1:]
    tree = tree_lib.build(acceptance, 17)
    for node in tree.paths:
      assert not node[-1] or (*node[:-1], node[-1] - 1) in tree.paths


@pytest.mark.parametrize(
  "acceptance, size, words",
  [
    ([[0.5]], 0, "size=0: the root alone is one node"),
    ([[0.5]], -3, "size=-3"),
    ([[0.5, -0.1]], 2, "these are not chances.*-0.1"),
    ([[0.5, 0.2], [0.7, 0.4]], 2, "these are not chances.*0.4"),
    ([[0.5, 0.2], [np.nan, np.nan]], 5, "these are not chances.*nan"),
  ],
)
def test_what_is_no_table_is_refused(acceptance, size, words):
  with pytest.raises(ValueError, match=words):
    tree_lib.build(np.array(acceptance), size)
