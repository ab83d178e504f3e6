"""Trees of drafts: which candidates of which heads one pass verifies.

A node is a path of ranks: (0, 2) is the first choice of head 2 followed by the
third choice of head 3. The root, the empty path, is the last accepted token.
A chain of k-1 drafts is the tree with one path, and ordinary decoding the
tree of the root alone.

Reference: Cai et al. 2024 (Medusa), section 2.3; the paper, section 3.2.
"""

import dataclasses
import functools
import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from mtp_jax.decode import checks

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
  """A static topology: the same for every row and pass.

  Attributes:
    paths: the nodes without the root, as paths of ranks, shallow ones first.
      Node i of the arrays below is paths[i-1], node 0 the root.
    candidates: heads are asked for at least so many, to count how often each
      would have been right.
  """

  paths: tuple[Path, ...] = ()
  candidates: int = 1

  @property
  def size(self) -> int:
    """M: tokens that a pass reads, the root included."""
    return len(self.paths) + 1

  @property
  def max_depth(self) -> int:
    """Drafts on the longest path: heads that draft, head 1 not counted."""
    return max(map(len, self.paths), default=0)

  @property
  def heads(self) -> int:
    """k: heads used, head 1 included."""
    return self.max_depth + 1

  @property
  def width(self) -> int:
    """R: candidates that each drafting head is asked for."""
    return max(self.candidates, *(max(p) + 1 for p in self.paths), 1)

  @property
  def is_chain(self) -> bool:
    """Whether every node is the first choice after the one before."""
    return all(p == (0,) * i for i, p in enumerate(self.paths, 1))

  @functools.cached_property
  def greedy_path(self) -> np.ndarray:
    """[d + 1] int32: the root, and the d nodes of first choices alone."""
    nodes = enumerate(((), *self.paths))
    return np.array([i for i, p in nodes if not any(p)], np.int32)

  @functools.cached_property
  def depth(self) -> np.ndarray:
    """[M] int32: drafts between the root and each node, itself included."""
    return np.array([0, *map(len, self.paths)], np.int32)

  @functools.cached_property
  def rank(self) -> np.ndarray:
    """[M] int32: place of each node's token among its head's candidates."""
    return np.array([0, *(p[-1] for p in self.paths)], np.int32)

  @functools.cached_property
  def parent(self) -> np.ndarray:
    """[M] int32, the root's is the root."""
    number = self._number
    return np.array([0, *(number[p[:-1]] for p in self.paths)], np.int32)

  @functools.cached_property
  def path_nodes(self) -> np.ndarray:
    """[M, k] int32: the nodes from the root to each node.

    The last one is repeated to fill the row.
    """
    number = self._number
    rows = [
      [number[p[:d]] for d in range(self.max_depth + 1)]
      for p in ((), *self.paths)
    ]
    return np.array(rows, np.int32).reshape(self.size, self.max_depth + 1)

  @functools.cached_property
  def ancestor_mask(self) -> np.ndarray:
    """[M, M] bool: node i attends to node j, an ancestor or itself."""
    mask = np.zeros((self.size, self.size), bool)
    mask[np.arange(self.size)[:, None], self.path_nodes] = True
    return mask

  @functools.cached_property
  def child(self) -> np.ndarray:
    """[M, R] int32: the node that continues i with rank r, or -1."""
    table = np.full((self.size, self.width), -1, np.int32)
    for i, (parent, rank) in enumerate(
      zip(self.parent, self.rank, strict=True)
    ):
      if i:
        table[parent, rank] = i
    return table

  @property
  def _number(self) -> dict[Path, int]:
    return {p: i for i, p in enumerate(((), *self.paths))}


def chain(heads: int, candidates: int = 1) -> Tree:
  """First choices only: the drafts of blockwise decoding with k heads.

  Args:
    heads: k.
    candidates: see `Tree`.

  Raises:
    ValueError: heads below 1.

  Example:
    >>> from mtp_jax.decode import tree
    >>> tree.chain(4).size  # the last token and 3 drafts
    4
  """
  if checks.integer("heads", heads) < 1:
    raise ValueError(f"heads={heads}: head 1 at least has to decode")
  return Tree(tuple((0,) * i for i in range(1, heads)), candidates)


def from_paths(paths: Iterable[Sequence[int]]) -> Tree:
  """A tree from lists of ranks in any order, such as Medusa's choice lists.

  Raises:
    ValueError: a rank that is negative or no integer, a node named twice or
      as the empty path, or one whose parent is missing.
  """
  nodes = sorted(
    (tuple(checks.integer("rank", r) for r in p) for p in paths),
    key=lambda p: (len(p), p),
  )
  known = {()}
  for node in nodes:
    if not node or min(node) < 0:
      raise ValueError(f"path {list(node)} names no draft: ranks count from 0")
    if node in known:
      raise ValueError(f"path {list(node)} is given twice")
    if node[:-1] not in known:
      raise ValueError(f"path {list(node)} hangs in the air: add its parent")
    known.add(node)
  return Tree(tuple(nodes))


def build(acceptance: np.ndarray, size: int) -> Tree:
  """The tree of at most `size` nodes that should accept the most drafts.

  It has fewer nodes only where no further path has a chance above 0.

  A node's chance is taken to be the product of its ranks' chances along its
  path. A tree's expected number of accepted drafts is the sum of its nodes'
  chances. A node is never likelier than its parent, so adding the likeliest
  node again and again is optimal if a head's chances fall with the rank. The
  product is too high for paths with second choices: chances are counted after
  drafts that were right, and those were mostly first choices.

  Args:
    acceptance: [k-1, R] chance that the rank-r candidate of head 2, 3, ... is
      right, given that the drafts before it were; rows sum to at most 1.
    size: most nodes M, the root included; at least 1.

  Raises:
    ValueError: size below 1, or chances that are none.

  Example:
    >>> from mtp_jax.decode import tree
    >>> tree.build([[0.6, 0.3], [0.5, 0.1]], 4).paths
    ((0,), (1,), (0, 0))
  """
  acceptance = np.asarray(acceptance, float)
  if checks.integer("size", size) < 1:
    raise ValueError(f"size={size}: the root alone is one node")
  if acceptance.ndim != 2 or not (
    (acceptance >= 0).all() and (acceptance.sum(-1) <= 1 + 1e-6).all()
  ):
    raise ValueError(f"these are not chances: {acceptance.tolist()}")
  # A rank after a likelier one of the same head: siblings stay without gaps,
  # as sampled drafts need it.
  chances = np.minimum.accumulate(acceptance, -1)
  drafts, width = chances.shape
  heap, nodes = [], []

  def offer(parent: Path, rank: int, before: float) -> None:
    if len(parent) < drafts and rank < width:
      chance = before * chances[len(parent), rank]
      heapq.heappush(heap, (-chance, len(parent), (*parent, rank), before))

  offer((), 0, 1.0)
  while heap and len(nodes) < size - 1:
    chance, _, node, before = heapq.heappop(heap)
    if not chance:
      break
    nodes.append(node)
    offer(node[:-1], node[-1] + 1, before)
    offer(node, 0, -chance)
  return from_paths(nodes)


def expected(tree: Tree, acceptance: np.ndarray) -> float:
  """Expected tokens per pass, the bonus token included.

  Args:
    tree: the topology.
    acceptance: [k-1, R] as for `build`; what it does not cover counts as 0.
  """
  acceptance = np.asarray(acceptance, float)
  full = np.zeros((tree.max_depth, tree.width))
  shape = tuple(map(min, full.shape, acceptance.shape))
  full[: shape[0], : shape[1]] = acceptance[: shape[0], : shape[1]]
  chance = np.ones(tree.size)
  for i in range(1, tree.size):
    chance[i] = chance[tree.parent[i]] * full[tree.depth[i] - 1, tree.rank[i]]
  return float(chance.sum())
