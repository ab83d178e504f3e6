"""One model, one batch size: every topology in turns, beside its limits."""

import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from experiments.engineering.decode_speed import report
from experiments.measure import limits, timing
from mtp_jax.decode import accept, blockwise, generate, network
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib


def one_batch(
  decoder: network.Network,
  trees: Sequence[tree_lib.Tree],
  prompts: Sequence[np.ndarray],
  batch: int,
  *,
  new: int,
  bandwidth: float,
  repeats: int = 3,
  peer: bool = False,
) -> dict[str, dict]:
  """A row per topology at one batch size, and the peer's.

  Args:
    decoder: the model.
    trees: topologies, ordinary decoding among them.
    prompts: of equal lengths, `batch` of them at least.
    batch: rows at once.
    new: tokens to write after each prompt.
    bandwidth: of the device's memory, bytes per second.
    repeats: timed turns of each.
    peer: let transformers decode as well.
  """
  groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
  groups = [g for g in groups if len(g) == batch]
  runs = {
    report.name(t): lambda t=t: decode(decoder, t, groups, new) for t in trees
  }
  if peer:
    from experiments.engineering.decode_speed import peer as peer_lib

    exported = peer_lib.export(decoder)
    runs["transformers"] = lambda: _peer_decode(peer_lib, exported, groups, new)
  texts = {name: call()[0] for name, call in runs.items()}  # compiles
  turns = timing.alternate(runs, repeats)
  seconds = {n: np.array([s for _, s in t]) for n, t in turns.items()}
  ordinary = report.name(tree_lib.chain(1))
  base = seconds[ordinary]
  rows = {}
  for name, found in texts.items():
    times = seconds[name]
    row = {
      "seconds_reading": times[:, 0].tolist(),
      "seconds_writing": times[:, 1].tolist(),
      "same_texts": same(found, texts[ordinary]),
    }
    total = np.median(base.sum(1) / times.sum(1))
    row["speedup_with_prompts"] = float(total)
    written = sum(len(t) for t in _tokens(found))
    row["tokens_per_second"] = float(written / np.median(times.sum(1)))
    if name != "transformers":
      row |= _figures(decoder, found, times, base, groups, bandwidth)
    rows[name] = row
    logging.info("batch %d, %s: %.2f times", batch, name, total)
  return rows


def decode(decoder, tree, groups, new):
  """(results, [seconds of the prompts, of the rest]) over all groups."""
  found, seconds, rule = [], np.zeros(2), accept.GREEDY
  for group in groups:
    begin = time.perf_counter()
    tokens, lengths = prompts_lib.pad(group, decoder.vocab)
    state = generate.start(decoder, tokens, lengths, tree=tree, max_new=new)
    jax.block_until_ready(state)
    middle = time.perf_counter()
    while not state.done.all():
      state = blockwise.run(decoder, rule, state)
      if not state.done.all():
        state = blockwise.grow(decoder, state)
    seconds += middle - begin, time.perf_counter() - middle
    found.append(generate.Result(generate.collect(state, lengths), tree))
  return found, seconds


def _peer_decode(peer, model, groups, new):
  """The same by transformers; its prompts are not timed apart."""
  found, seconds = [], 0.0
  for group in groups:
    begin = time.perf_counter()
    found.append(peer.generate(model, group, new))
    seconds += time.perf_counter() - begin
  return found, np.array([0.0, seconds])


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
    "near_ties": whole.near_ties(report.EPSILON),
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
    place = report.common(a, b.tokens)
    if place < len(b.tokens):
      margins.append(float(b.margin[place]))
  return {
    "of": len(texts),
    "same": len(texts) - len(margins),
    "margins": margins,
  }
