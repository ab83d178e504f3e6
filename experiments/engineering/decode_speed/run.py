"""Ordinary, blockwise and tree decoding of trained models, in turn.

  python -m experiments.engineering.decode_speed.run \\
    --workdirs=runs/bytes,runs/pieces

Continues held-out prompts at several batch sizes with every topology that
`decode.autotune` tries and a chain of 3, all of them in alternating turns, and
writes for each: tokens per forward, seconds, speedup, efficiency (speedup over
tokens per forward) beside its limit from the bytes that a pass reads, and
whether the texts are ordinary decoding's. The trees are built on other
held-out prompts. Then more prompts go through the server, where 'auto' is one
of the candidates. With --peer Hugging Face's transformers (torch) decodes the
same weights in the same turns.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from experiments.engineering.decode_speed import (
  pictures,
  precision,
  report,
  serving,
)
from experiments.measure import compare, limits, study
from experiments.startup import options, program
from mtp_jax.checkpoint import storage
from mtp_jax.data import pipeline
from mtp_jax.decode import autotune, layout
from mtp_jax.decode import tree as tree_lib
from mtp_jax.train import workdir

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
_OUTPUT = options.define_output("Folder that takes the results.")
flags.mark_flag_as_required("workdirs")


def main(_: list[str]) -> None:
  """Measures each model; results are saved after each batch size."""
  most = max(map(int, _BATCHES.value))
  if most > _PROMPTS.value:
    raise ValueError(f"a batch of {most} needs --prompts={most}")
  folder = _OUTPUT.value
  folder.mkdir(parents=True, exist_ok=True)
  result = study.provenance(seed=0) | {
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
      study.write_json(folder / "results.json", result)
  pictures.write(folder, result)
  print(report.tables(result))


def measure(net, cfg, codec, held, bandwidth: float) -> Iterator[dict]:
  """Everything about one model, so far: once more after each batch size."""
  jax.clear_caches()  # of another model: see below
  decoder = layout.lay_out(net, codec.vocab)
  new = cfg.data.seq_len - _PROMPT_LEN.value
  counts = _PROMPTS.value // 2, _PROMPTS.value, _SERVED.value
  every = held.excerpts(
    sum(counts), _PROMPT_LEN.value, cfg.data.seq_len, per_document=8
  )
  every = [every[i] for i in np.random.default_rng(0).permutation(sum(counts))]
  tuning, prompts, served = np.split(every, np.cumsum(counts)[:2])
  acceptance = autotune.measure_acceptance(decoder, tuning, max_new=new)
  automatic = autotune.topologies(acceptance)
  trees = sorted({*automatic, tree_lib.chain(3)}, key=_order)
  trees = [t for t in trees if t.heads <= decoder.n_future]
  result = {
    "config": dataclasses.asdict(cfg.model),
    "parameters": sum(a.size for a in jax.tree.leaves(net)),
    "acceptance": acceptance.tolist(),
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
    rows = compare.one_batch(
      decoder,
      trees,
      compare.Work(used, batch, new, _REPEATS.value),
      bandwidth=bandwidth,
      others=_others(net, codec),
    )
    longest = _PROMPT_LEN.value + new
    load = autotune.Load(batch, longest - new // 2, longest)
    expected = autotune.options(decoder, acceptance, load, trees=trees)
    for option in expected:
      row = rows[compare.name(option.tree)]
      row["predicted_tokens_per_second"] = option.tokens_per_second * batch
      row["predicted_tokens_per_forward"] = option.tokens_per_forward
    result["batches"][str(batch)] = rows
    count = min(max(2 * _FEWEST.value, 3 * batch), len(served))
    result["served"][str(batch)] = serving.measure(
      decoder,
      expected,
      autotune.best([o for o in expected if o.tree in automatic]),
      compare.Work(served[:count], batch, new, _REPEATS.value),
    )
    yield result


def _others(net, codec) -> dict:
  """Other decoders of the same weights, as `compare.one_batch` takes them."""
  if not _PEER.value:
    return {}
  from experiments.measure import peer

  llama = peer.of(net, codec)
  return {"transformers": functools.partial(peer.decode, llama)}


def _order(tree):
  return not tree.is_chain, tree.size


if __name__ == "__main__":
  program.start(main)
