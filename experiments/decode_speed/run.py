"""Ordinary, blockwise and tree decoding of trained models, in turn.

  python -m experiments.decode_speed.run --workdirs=runs/bytes,runs/pieces

Continues held-out prompts at several batch sizes with every topology that
`decode.choose` tries and a chain of 3, all of them in alternating turns, and
writes for each: tokens per forward, seconds, speedup, efficiency (speedup over
tokens per forward) beside its limit from the bytes that a pass reads, and
whether the texts are ordinary decoding's. The trees are built on other held-out prompts.
Then more prompts go through the server, with what 'auto' takes among the rest.
With --peer Hugging Face's transformers (torch) decodes the same weights in the
same turns.
"""

import dataclasses
import json
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags, logging

from experiments import program
from experiments.decode_speed import limits, precision, report, serving
from mtp_jax import storage, workdir
from mtp_jax.data import pipeline
from mtp_jax.decode import accept, blockwise, choose, generate, prepare
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Folders of training runs.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Rows at once.")
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Held-out prompts, tuning's no.")
_FEWEST = flags.DEFINE_integer("fewest", 8, "Prompts at batches below this.")
_SERVED = flags.DEFINE_integer(
  "served", 96, "Prompts through the server, three for each row at most."
)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of a prompt.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns of each.", lower_bound=1)
_PEER = flags.DEFINE_bool("peer", False, "Let transformers decode as well.")
_OUTPUT = program.define_path("output", None, "Folder that takes the results.")
flags.mark_flags_as_required(["workdirs", "output"])


def main(_: list[str]) -> None:
  most = max(map(int, _BATCHES.value))
  if most > _PROMPTS.value:
    raise ValueError(f"a batch of {most} needs --prompts={most}")
  folder = _OUTPUT.value
  folder.mkdir(parents=True, exist_ok=True)
  result = {
    "machine": program.machine(),
    "bandwidth": limits.bandwidth(),
    "models": {},
  }
  for path in map(storage.local, _WORKDIRS.value):
    net, cfg, codec = workdir.load(path)
    if cfg.model.n_future < 2:
      raise ValueError(f"{path} has one head: nothing to compare")
    _, held = pipeline.pack(cfg.data, codec)
    for found in measure(net, cfg, codec, held, result["bandwidth"]):
      result["models"][path.name] = found
      (folder / "results.json").write_text(
        json.dumps(result, indent=1) + "\n", encoding="utf-8"
      )
  report.write(folder, result)
  print(report.tables(result))


def measure(net, cfg, codec, held, bandwidth: float) -> Iterator[dict]:
  """Everything about one model, so far: once more after each batch size."""
  jax.clear_caches()  # of another model: see below
  decoder = prepare.decoder(net, codec.vocab)
  new = cfg.data.seq_len - _PROMPT_LEN.value
  counts = _PROMPTS.value // 2, _PROMPTS.value, _SERVED.value
  every = held.excerpts(
    sum(counts), _PROMPT_LEN.value, cfg.data.seq_len, per_document=8
  )
  every = [every[i] for i in np.random.default_rng(0).permutation(sum(counts))]
  tuning, prompts, served = np.split(every, np.cumsum(counts)[:2])
  chances = choose.acceptance(decoder, tuning, max_new=new)
  automatic = choose.topologies(chances)
  trees = sorted({*automatic, tree_lib.chain(3)}, key=_order)
  trees = [t for t in trees if t.heads <= decoder.n_future]
  result = {
    "config": dataclasses.asdict(cfg.model),
    "parameters": sum(a.size for a in jax.tree.leaves(net)),
    "acceptance": chances.tolist(),
    "prompt_len": _PROMPT_LEN.value,
    "new": new,
    "batches": {},
    "served": {},
    "drafts": precision.drafts(net, codec, prompts, new, trees),
    "caches": precision.caches(net, codec, prompts, new),
  }
  for batch in map(int, _BATCHES.value):
    # Programs hold memory maps, of which Linux allows a process 65,530; most
    # likely that is why the compiler crashed behind two models' programs.
    jax.clear_caches()
    used = prompts[: max(batch, _FEWEST.value)]
    rows = one_batch(decoder, trees, used, batch, new, bandwidth)
    expected = choose.options(
      decoder,
      chances,
      batch=batch,
      length=_PROMPT_LEN.value + new // 2,
      trees=trees,
    )
    for option in expected:
      row = rows[report.name(option.tree)]
      row["predicted_tokens_per_second"] = option.tokens_per_second * batch
      row["predicted_tokens_per_forward"] = option.tokens_per_forward
    result["batches"][str(batch)] = rows
    count = min(max(2 * _FEWEST.value, 3 * batch), len(served))
    result["served"][str(batch)] = serving.measure(
      decoder,
      expected,
      choose.best([o for o in expected if o.tree in automatic]),
      served[:count],
      slots=batch,
      new=new,
      repeats=_REPEATS.value,
    )
    yield result


def one_batch(decoder, trees, prompts, batch, new, bandwidth) -> dict:
  """A row per topology at one batch size, and the peer's."""
  groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
  groups = [g for g in groups if len(g) == batch]
  runs = {
    report.name(t): lambda t=t: decode(decoder, t, groups, new) for t in trees
  }
  if _PEER.value:
    from experiments.decode_speed import peer

    exported = peer.export(decoder)
    runs["transformers"] = lambda: peer_decode(peer, exported, groups, new)
  texts = {name: call()[0] for name, call in runs.items()}  # compiles
  seconds = {name: [] for name in runs}
  for _ in range(_REPEATS.value):
    for name, call in runs.items():
      seconds[name].append(call()[1])
  ordinary = report.name(tree_lib.chain(1))
  base = np.array(seconds[ordinary])
  rows = {}
  for name, found in texts.items():
    times = np.array(seconds[name])
    row = {
      "seconds_reading": times[:, 0].tolist(),
      "seconds_writing": times[:, 1].tolist(),
      "same_texts": _same(found, texts[ordinary]),
    }
    total = np.median(base.sum(1) / times.sum(1))
    row["speedup_with_prompts"] = float(total)
    written = sum(len(t) for t in _tokens(found))
    row["tokens_per_second"] = float(written / np.median(times.sum(1)))
    if name != "transformers":
      row |= _figures(decoder, found, times, base, batch, bandwidth)
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


def peer_decode(peer, model, groups, new):
  """The same by transformers; its prompts are not timed apart."""
  found, seconds = [], 0.0
  for group in groups:
    begin = time.perf_counter()
    found.append(peer.generate(model, group, new))
    seconds += time.perf_counter() - begin
  return found, np.array([0.0, seconds])


def _figures(decoder, found, times, base, batch, bandwidth):
  tree = found[0].tree
  whole = generate.Result([t for r in found for t in r.texts], tree)
  per_forward = whole.tokens_per_forward
  speedup = float(np.median(base[:, 1] / times[:, 1]))
  # Rows of a group that are done compute along: passes of the slowest row.
  passes = sum(r.passes.max() for r in found)
  per_pass = float(np.median(times[:, 1])) / passes
  length = np.mean([len(t.tokens) for t in whole.texts]) / 2
  length += _PROMPT_LEN.value
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


def _same(found, ordinary) -> dict:
  """How many texts are ordinary decoding's, and the margins where not."""
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


def _order(tree):
  return not tree.is_chain, tree.size


if __name__ == "__main__":
  program.start(main)
