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
from typing import Any

import jax
import numpy as np

from mtp_jax.decode import accept, checks, generate, interface, loop
from mtp_jax.decode import tree as tree_lib

CANDIDATES = 10  # ranks of a head's candidates that are counted
SIZES = (8, 16, 32, 64)  # nodes of the trees that are tried
CALL = 0.2  # seconds of passes that are timed at once
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


@dataclasses.dataclass(frozen=True)
class Load:
  """What the passes that are timed work on."""

  batch: int  # rows B
  length: int  # tokens in each row's cache
  longest: int = 0  # tokens of the longest text, which the cache has room for
  cache_len: int | None = None  # its positions; None: as many as are needed


def choose(
  decoder: interface.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  batch: int,
  **settings: Any,
) -> Option:
  """What `best` makes of `options` for prompts like these.

  Its tree is what `mtp_jax.generate` takes as `heads`.

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    prompts: sequences of token ids; they are decoded once.
    batch: rows B of the decoding to come.
    **settings: of `interface.check_settings`, without heads.
  """
  batch = checks.integer("batch", batch, 1)  # before prompts are decoded
  rule = settings.get("rule", accept.GREEDY)
  acceptance = measure_acceptance(decoder, prompts, **settings)
  longest = max(map(len, prompts)) + settings["max_new"]
  load = Load(batch, longest - settings["max_new"] // 2, longest)
  return best(options(decoder, acceptance, load, rule=rule))


def best(options: Sequence[Option]) -> Option:
  """The fastest option, or ordinary decoding if none is `GAIN` times as fast.

  Every row is taken to be at work all the time, as `serve.generate_all`
  keeps them: in a batch that ends with its slowest row, drafts gain less.
  """
  ordinary = next(o for o in options if not o.tree.max_depth)
  fastest = max(options, key=lambda option: option.tokens_per_second)
  gain = fastest.tokens_per_second / ordinary.tokens_per_second
  return fastest if gain >= GAIN else ordinary


def measure_acceptance(
  decoder: interface.Decoder, prompts: Sequence[Sequence[int]], **settings: Any
) -> np.ndarray:
  """Acceptance [N-1, R] for `tree.build`, counted on some prompts' texts.

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    prompts: sequences of token ids.
    **settings: of `interface.check_settings`, without heads.

  Returns:
    Row i, column r: how often the rank-r candidate of head i+2 was right where
    the drafts before it were; 0 where that never happened. Right is what the
    rule wrote: with rules that draw, candidates beyond the first are
    underrated, since a tree would have tried them too.
  """
  tree = tree_lib.chain(decoder.n_future, min(CANDIDATES, decoder.vocab))
  result = generate.generate(decoder, prompts, heads=tree, **settings)
  return np.nan_to_num(result.rank_acceptance)


def topologies(acceptance: np.ndarray) -> list[tree_lib.Tree]:
  """Ordinary decoding, chains of 2, 4, 8, ... and N heads, and built trees."""
  most = len(acceptance) + 1
  counts = {1, most} | {1 << i for i in range(1, most.bit_length())}
  trees = [tree_lib.chain(k) for k in sorted(counts) if k <= most]
  if most > 1:
    trees += [tree_lib.build(acceptance, size) for size in SIZES]
  return list(dict.fromkeys(trees))


def options(
  decoder: interface.Decoder,
  acceptance: np.ndarray,
  load: Load,
  *,
  trees: Sequence[tree_lib.Tree] | None = None,
  rule: interface.Rule = accept.GREEDY,
) -> list[Option]:
  """Every topology with its expected tokens and its measured seconds.

  Args:
    decoder: the model.
    acceptance: from `measure_acceptance`.
    load: rows, and tokens in their caches.
    trees: to choose from; None: `topologies(acceptance)`.
    rule: whose work a pass does, from `accept`.
  """
  trees = topologies(acceptance) if trees is None else trees
  seconds = seconds_per_pass(decoder, trees, load, rule=rule)
  return [
    Option(tree, tree_lib.expected(tree, acceptance), s)
    for tree, s in zip(trees, seconds, strict=True)
  ]


def seconds_per_pass(
  decoder: interface.Decoder,
  trees: Sequence[tree_lib.Tree],
  load: Load,
  *,
  repeats: int = 5,
  rule: interface.Rule = accept.GREEDY,
) -> list[float]:
  """Seconds of one pass of each tree: medians over calls that alternate.

  A call has 8 to `PASSES` passes and takes about `CALL` seconds. The first
  passes after a prompt are slower, and would dominate a shorter call.

  Args:
    decoder: the model.
    trees: topologies.
    load: rows, and tokens in their caches before the passes.
    repeats: calls of each tree.
    rule: whose cost a pass includes; no draft is accepted.

  Raises:
    ValueError: batch, length or repeats below 1.
  """
  batch = checks.integer("batch", load.batch, 1)
  length = checks.integer("length", load.length, 1)
  repeats = checks.integer("repeats", repeats, 1)
  rule = accept.Forced(0, rule)
  tokens = np.zeros((batch, length), np.int32)
  lengths = np.full((batch,), length, np.int32)

  def call(tree, passes):
    settings = interface.check_settings(
      decoder, heads=tree, max_new=PASSES + 1, rule=rule
    )
    S, _ = generate.sizes(length, tree, PASSES + 1, load.cache_len)
    if load.cache_len is None:
      S = max(S, generate.last_size(load.longest, tree))
    state = generate.start(decoder, tokens, lengths, settings, cache_len=S)
    state = dataclasses.replace(state, end=state.length + passes)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    state = jax.block_until_ready(loop.run_jit(decoder, rule, state))
    return (time.perf_counter() - begin) / passes

  passes = []
  for tree in trees:
    call(tree, 8)  # compiles
    passes.append(min(max(8, int(CALL / call(tree, 8))), PASSES))
  times = [
    [call(*each) for each in zip(trees, passes, strict=True)]
    for _ in range(repeats)
  ]
  return [statistics.median(column) for column in zip(*times, strict=True)]
