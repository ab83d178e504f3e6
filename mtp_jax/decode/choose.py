"""Chooses the fastest drafts for a batch size: none, a chain, or a tree.

Tokens per second are the expected tokens of a pass over its seconds. The tokens
come from decoding some prompts once and counting how often each head's
candidates were right, by rank. The seconds are measured for every topology on
this device at this batch size, since a wider window costs more with more rows.
Ordinary decoding is always among the choices, and is kept unless another one
promises to be clearly faster.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from mtp_jax.decode import accept, blockwise, checks, generate
from mtp_jax.decode import tree as tree_lib

CANDIDATES = 10  # ranks of a head's candidates that are counted
SIZES = (8, 16, 32, 64)  # nodes of the trees that are tried
TURN = 0.2  # seconds of passes that are timed at once
PASSES = 64  # of them at most
GAIN = 1.1  # times ordinary decoding's speed that drafts have to promise


@dataclasses.dataclass(frozen=True)
class Option:
  """One topology, and what is expected of it."""

  tree: tree_lib.Tree
  tokens_per_forward: float  # the bonus token included
  seconds: float  # of one pass

  @property
  def tokens_per_second(self) -> float:
    """Of one row."""
    return self.tokens_per_forward / self.seconds


def choose(
  network,
  prompts: Sequence[Sequence[int]],
  *,
  batch: int,
  max_new: int,
  stop: int | Sequence[int] | None = None,
  rule=accept.GREEDY,
  seed: int = 0,
) -> Option:
  """What `best` makes of `options` for prompts like these."""
  batch = checks.integer("batch", batch, 1)  # before prompts are decoded
  chances = acceptance(
    network, prompts, max_new=max_new, stop=stop, rule=rule, seed=seed
  )
  length = max(map(len, prompts)) + max_new // 2
  found = options(network, chances, batch=batch, length=length, rule=rule)
  return best(found)


def best(found: Sequence[Option]) -> Option:
  """The fastest option, or ordinary decoding if none is `GAIN` times as fast.

  Every row is taken to be at work all the time, as `serve.generate_all`
  keeps them: in a batch that ends with its slowest row, drafts gain less.
  """
  ordinary = next(o for o in found if not o.tree.drafts)
  fastest = max(found, key=lambda option: option.tokens_per_second)
  gain = fastest.tokens_per_second / ordinary.tokens_per_second
  return fastest if gain >= GAIN else ordinary


def acceptance(
  network,
  prompts: Sequence[Sequence[int]],
  *,
  max_new: int,
  stop: int | Sequence[int] | None = None,
  rule=accept.GREEDY,
  seed: int = 0,
) -> np.ndarray:
  """Chances [N-1, R] for `tree.build`, counted on some prompts' texts.

  Returns:
    Row i, column r: how often the rank-r candidate of head i+2 was right where
    the drafts before it were; 0 where that never happened. Right is what the
    rule wrote: with rules that draw, candidates beyond the first are
    underrated, since a tree would have tried them too.
  """
  tree = tree_lib.chain(network.n_future, min(CANDIDATES, network.vocab))
  found = generate.generate(
    network,
    prompts,
    heads=tree,
    max_new=max_new,
    stop=stop,
    rule=rule,
    seed=seed,
  )
  return np.nan_to_num(found.ranks)


def topologies(chances: np.ndarray) -> list[tree_lib.Tree]:
  """Ordinary decoding, chains of 2, 4, 8, ... and N heads, and built trees."""
  most = len(chances) + 1
  counts = {1, most} | {1 << i for i in range(1, most.bit_length())}
  trees = [tree_lib.chain(k) for k in sorted(counts) if k <= most]
  if most > 1:
    trees += [tree_lib.build(chances, size) for size in SIZES]
  return list(dict.fromkeys(trees))


def options(
  network,
  chances: np.ndarray,
  *,
  batch: int,
  length: int,
  trees: Sequence[tree_lib.Tree] | None = None,
  rule=accept.GREEDY,
) -> list[Option]:
  """Every topology with its expected tokens and its measured seconds.

  Args:
    network: the decoder.
    chances: from `acceptance`.
    batch: rows B.
    length: tokens in each row's cache.
    trees: to choose from; None: `topologies(chances)`.
    rule: whose work a pass does, from `accept`.
  """
  trees = topologies(chances) if trees is None else trees
  seconds = seconds_per_pass(
    network, trees, batch=batch, length=length, rule=rule
  )
  return [
    Option(tree, tree_lib.expected(tree, chances), s)
    for tree, s in zip(trees, seconds, strict=True)
  ]


def seconds_per_pass(
  network,
  trees: Sequence[tree_lib.Tree],
  *,
  batch: int,
  length: int,
  repeats: int = 5,
  cache_len: int | None = None,
  rule=accept.GREEDY,
) -> list[float]:
  """Seconds of one pass of each tree: medians over turns that alternate.

  A turn is one call of about `TURN` seconds, with 8 to `PASSES` passes. The
  first passes after a prompt are slower, and would dominate a shorter call.

  Args:
    network: the decoder.
    trees: topologies.
    batch: rows B.
    length: tokens in each row's cache, before the passes.
    repeats: turns of each tree.
    cache_len: positions of the cache; None: as many as the tokens need.
    rule: whose cost a pass includes; no draft is accepted.

  Raises:
    ValueError: batch, length or repeats below 1.
  """
  batch = checks.integer("batch", batch, 1)
  length = checks.integer("length", length, 1)
  repeats = checks.integer("repeats", repeats, 1)
  rule = accept.Forced(0, rule)
  tokens = np.zeros((batch, length), np.int32)
  lengths = np.full((batch,), length, np.int32)

  def turn(tree, passes):
    state = generate.start(
      network,
      tokens,
      lengths,
      tree=tree,
      max_new=PASSES + 1,
      rule=rule,
      cache_len=cache_len,
    )
    state = dataclasses.replace(state, end=state.length + passes)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    state = jax.block_until_ready(blockwise.run(network, rule, state))
    # Fewer than asked for where they filled the cache.
    return (time.perf_counter() - begin) / int(state.passes.max())

  passes = []
  for tree in trees:
    turn(tree, 8)  # compiles
    passes.append(min(max(8, int(TURN / turn(tree, 8))), PASSES))
  times = [
    [turn(*each) for each in zip(trees, passes, strict=True)]
    for _ in range(repeats)
  ]
  return [statistics.median(column) for column in zip(*times, strict=True)]
