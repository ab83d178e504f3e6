"""Continues prompts with the new heads, ordinarily, and by transformers."""

import functools
import gzip
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments.claims.heads_for_a_model import scales
from experiments.demo import figures
from experiments.demo import report as demo_report
from experiments.measure import compare, limits
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.data import pipeline
from mtp_jax.decode import autotune
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.interchange import folders
from mtp_jax.model import model


def prompts(
  held: pipeline.Packed,
  codec: tokenizer_lib.Tokenizer,
  humaneval: pathlib.Path | None,
  scale: scales.Scale,
) -> dict[str, list[np.ndarray]]:
  """Prompts by name: beginnings of held-out files, HumanEval's problems.

  Args:
    held: the files that no head saw.
    codec: the tokenizer.
    humaneval: HumanEval.jsonl.gz; None leaves its problems out.
    scale: how many, and how long those of files are.
  """
  count = max((scale.prompts, *scale.batches))
  size = scale.prompt_len + scale.new
  found = {
    "files": held.excerpts(count, scale.prompt_len, size, per_document=8)
  }
  if humaneval is not None:
    with gzip.open(humaneval, "rt", encoding="utf-8") as lines:
      texts = [json.loads(line)["prompt"] for line in lines]
    chosen = np.linspace(0, len(texts) - 1, scale.prompts).astype(int)
    found["humaneval"] = [
      np.array([*codec.prefix, *codec.encode(texts[i].rstrip() + "\n")])
      for i in chosen
    ]
  return found


def trees(
  decoder: decoder_lib.Transformer, tuning: list[np.ndarray], new: int
) -> list[tree_lib.Tree]:
  """Ordinary decoding, every chain, and a tree of 8 built on prompts."""
  acceptance = autotune.measure_acceptance(decoder, tuning, max_new=new)
  chains = [tree_lib.chain(k) for k in range(1, decoder.n_future + 1)]
  return [*chains, tree_lib.build(acceptance, 8)]


def measure(
  decoder: decoder_lib.Transformer,
  texts: Mapping[str, list[np.ndarray]],
  topologies: list[tree_lib.Tree],
  scale: scales.Scale,
  others: Mapping[str, Callable],
) -> dict[str, dict]:
  """'prompts, batch' -> a row for every topology and other decoder.

  Prompts of several lengths are decoded at the first batch size alone, 1.
  """
  bandwidth, found = limits.bandwidth(), {}
  for name, some in texts.items():
    equal = len({len(p) for p in some}) == 1
    for batch in scale.batches if equal else scale.batches[:1]:
      used = some[: max(batch, scale.prompts)]
      work = compare.Work(used, batch, scale.new, scale.repeats)
      found[f"{name}, {batch}"] = compare.one_batch(
        decoder,
        topologies,
        work,
        bandwidth=bandwidth,
        others=others,
      )
  return found


def completions(
  net: model.Model,
  decoder: decoder_lib.Transformer,
  codec: tokenizer_lib.Tokenizer,
  some: list[np.ndarray],
  scale: scales.Scale,
) -> dict:
  """What the demo's page shows: a few prompts continued with 1 to N heads."""
  prompts = [p.tolist() for p in some[:4]]
  entries = figures.decode(
    [decoder] * len(prompts),
    codec,
    prompts,
    heads=net.cfg.drafting,
    new=scale.new,
    repeats=scale.repeats,
  )
  texts = [codec.decode(tokens) for tokens in entries[0]["tokens"]]
  return {
    "prompts": prompts,
    "decoding": entries,
    "most_repeats": demo_report.most_repeats_of(texts),
  }


def scores(held: pipeline.Packed, found: Mapping) -> dict:
  """The heads' measures on held-out files, as the demo's page shows them."""
  nats = np.array(found["held_out_nats"])
  return {
    "bits_per_byte": (nats / np.log(2) / held.bytes_per_token).tolist(),
    "accuracy": found["held_out_accuracy"],
    "predicted_tokens_per_forward": found["predicted_tokens_per_forward"],
    "tokens": found["held_out_tokens"],
  }


def peer(folder: pathlib.Path, dtype: str) -> dict[str, Callable]:
  """transformers' decoding of the same folder on a CPU, if it is installed.

  None of a workdir or of Meta's format, which transformers does not read.
  """
  if jax.default_backend() != "cpu":  # torch would still use the CPU
    return {}
  if folders.kind(folder) != "hugging_face":
    return {}
  try:
    from experiments.measure import peer as peer_lib
  except ImportError:
    return {}
  model = peer_lib.load(folder, dtype=dtype)
  return {"transformers": functools.partial(peer_lib.decode, model)}
