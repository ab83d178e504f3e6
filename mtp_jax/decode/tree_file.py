"""Draft trees for a trained model, one for each size, as a file holds them."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from mtp_jax.decode import tree as tree_lib


def build(acceptance: np.ndarray, sizes: Sequence[int]) -> dict:
  """For each size, the tree with the highest expected acceptance.

  >>> found = build(np.array([[0.6, 0.2], [0.5, 0.1]]), [4])
  >>> found["trees"]["4"]["paths"]
  [[0], [1], [0, 0]]

  Args:
    acceptance: [k-1, R], from `autotune.measure_acceptance`.
    sizes: the most nodes that each tree may have.

  Returns:
    `acceptance` itself; `chain`, the expected tokens per forward of a
    chain of all heads; `trees`, by size `paths` for `tree.from_paths` and
    `tokens_per_forward`. Plain lists and numbers, for JSON.
  """
  trees = [tree_lib.build(acceptance, size) for size in sizes]
  chain = tree_lib.chain(len(acceptance) + 1)
  return {
    "acceptance": acceptance.tolist(),
    "chain": tree_lib.expected(chain, acceptance),
    "trees": {
      str(size): {
        "paths": [list(path) for path in tree.paths],
        "tokens_per_forward": tree_lib.expected(tree, acceptance),
      }
      for size, tree in zip(sizes, trees, strict=True)
    },
  }


def read(path: pathlib.Path, size: int) -> tree_lib.Tree:
  """The tree for `size` in a file that `experiments.tune_tree` wrote.

  Args:
    path: tree.json of a workdir.
    size: the size that it was built for, its most nodes.

  Raises:
    ValueError: the file lacks this size, is not there, or is damaged.
  """
  try:
    trees = {}
    if path.exists():
      trees = json.loads(path.read_text(encoding="utf-8"))["trees"]
    if str(size) in trees:
      return tree_lib.from_paths(trees[str(size)]["paths"])
  except (ValueError, TypeError, LookupError) as error:
    raise ValueError(f"{path} is damaged ({error})") from error
  raise ValueError(f"no tree of {size} nodes in {path}")
