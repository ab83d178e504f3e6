"""One model, one batch size: every topology in turns, beside its limits."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import logging

from experiments.measure import limits, timing
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import generate, interface, loop
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib

EPSILON = 1e-4  # top-two margin of logits below which a tie may fall either way


@dataclasses.dataclass(frozen=True)
class Work:
  """Prompts of equal lengths, continued `batch` at once by `new` tokens."""

  prompts: Sequence[np.ndarray]
  batch: int
  new: int
  repeats: int = 3  # timed turns of each topology

  @property
  def groups(self) -> list[Sequence[np.ndarray]]:
    """Whole batches; the prompts that are left do not fill one."""
    last = len(self.prompts) - self.batch + 1
    starts = range(0, last, self.batch)
    return [self.prompts[i : i + self.batch] for i in starts]


def one_batch(
  decoder: decoder_lib.Transformer,
  trees: Sequence[tree_lib.Tree],
  work: Work,
  *,
  bandwidth: float,
  others: Mapping[str, Callable] | None = None,
) -> dict[str, dict]:
  """A row per topology at one batch size, and per other decoder.

  Args:
    decoder: the model.
    trees: topologies, ordinary decoding among them.
    work: what is decoded, and how often.
    bandwidth: of the device's memory, bytes per second.
    others: by name, functions of (groups, new) that return what `decode` does,
      with lists of ids in place of results.
  """
  groups, others = work.groups, others or {}
  runs = {
    name(t): functools.partial(decode, decoder, t, groups, work.new)
    for t in trees
  }
  for label, call in others.items():
    runs[label] = functools.partial(call, groups, work.new)
  texts = {label: call()[0] for label, call in runs.items()}  # compiles
  turns = timing.alternate(runs, work.repeats)
  seconds = {n: np.array([s for _, s in t]) for n, t in turns.items()}
  ordinary = name(tree_lib.chain(1))
  base = seconds[ordinary]
  rows = {}
  for label, found in texts.items():
    times = seconds[label]
    row = {
      "seconds_reading": times[:, 0].tolist(),
      "seconds_writing": times[:, 1].tolist(),
      "same_texts": same(found, texts[ordinary]),
    }
    total = np.median(base.sum(1) / times.sum(1))
    row["speedup_with_prompts"] = float(total)
    written = sum(len(t) for t in _tokens(found))
    row["tokens_per_second"] = float(written / np.median(times.sum(1)))
    if label not in others:
      row |= _figures(decoder, found, times, base, groups, bandwidth)
    rows[label] = row
    logging.info("batch %d, %s: %.2f times", work.batch, label, total)
  return rows


def decode(decoder, tree, groups, new):
  """(results, [seconds of the prompts, of the rest]) over all groups."""
  found, seconds = [], np.zeros(2)
  settings = interface.check_settings(decoder, heads=tree, max_new=new)
  for group in groups:
    begin = time.perf_counter()
    tokens, lengths = prompts_lib.pad(group, decoder.vocab)
    state = generate.start(decoder, tokens, lengths, settings)
    jax.block_until_ready(state)
    middle = time.perf_counter()
    state = loop.finish(decoder, settings.rule, state)
    seconds += middle - begin, time.perf_counter() - middle
    found.append(generate.Result(generate.collect(state, lengths), tree))
  return found, seconds


def name(tree: tree_lib.Tree) -> str:
  """'ordinary', 'chain 4' or 'tree 16'."""
  if tree.size == 1:
    return "ordinary"
  kind = "chain" if tree.is_chain else "tree"
  return f"{kind} {tree.size}"


def common(a, b) -> int:
  """Length of the common beginning."""
  size = min(len(a), len(b))
  return int(np.argmax(np.append(a[:size] != b[:size], True)))


def _figures(decoder, found, times, base, groups, bandwidth):
  tree = found[0].tree
  whole = generate.Result([t for r in found for t in r.texts], tree)
  per_forward = whole.tokens_per_forward
  speedup = float(np.median(base[:, 1] / times[:, 1]))
  # Rows of a group that are done compute along: passes of the slowest row.
  passes = sum(r.passes.max() for r in found)
  per_pass = float(np.median(times[:, 1])) / passes
  length = np.mean([len(t.tokens) for t in whole.texts]) / 2
  length += np.mean([len(p) for group in groups for p in group])
  batch = len(groups[0])
  ordinary = limits.bytes_per_pass(decoder, tree_lib.chain(1), batch, length)
  read = limits.bytes_per_pass(decoder, tree, batch, length)
  rows = sum(len(r.texts) for r in found) / len(found)
  return {
    "size": tree.size,
    "heads": tree.heads,
    "tokens_per_forward": per_forward,
    "idle_rows": float(1 - whole.passes.sum() / passes / rows),
    "accepted": whole.accepted.tolist(),
    "accepted_in_turn": whole.accepted_in_turn.tolist(),
    "wasted": whole.wasted,
    "near_ties": whole.near_ties(EPSILON),
    "speedup": speedup,
    "efficiency": speedup / per_forward,
    "limit": ordinary / read,
    "ratio_to_limit": speedup / per_forward / (ordinary / read),
    "milliseconds_per_pass": per_pass * 1e3,
    "share_of_bandwidth": read / per_pass / bandwidth,
  }


def _tokens(found) -> list[np.ndarray]:
  return [
    t
    for result in found
    for t in (result.tokens if isinstance(result, generate.Result) else result)
  ]


def same(found: Sequence, ordinary: Sequence[generate.Result]) -> dict:
  """How many texts are ordinary decoding's, and the margins where not.

  Args:
    found: a `generate.Result`, or the peer's lists of ids, per group.
    ordinary: the same groups' ordinary texts.
  """
  margins = []
  texts = [t for r in ordinary for t in r.texts]
  for a, b in zip(_tokens(found), texts, strict=True):
    place = common(a, b.tokens)
    if place < len(b.tokens):
      margins.append(float(b.margin[place]))
  return {
    "of": len(texts),
    "same": len(texts) - len(margins),
    "margins": margins,
  }
