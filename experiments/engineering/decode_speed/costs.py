"""What a decoding pass costs: by its width, and by what the cache holds.

  python -m experiments.engineering.decode_speed.costs \\
    --config=configs/decode_speed.py:pieces

Random weights, so the model need not be trained: `accept.Forced` accepts a
given number of drafts, however good the model is. Measures
seconds per pass of 1, 2, 4, ... tokens at each batch size, and of ordinary
decoding with 1/8, 1/2 and all of --cache_len tokens, in caches of each dtype
that have grown with the text and in some that had --cache_len positions from
the start; beside them the share of the memory bandwidth that the bytes of
weights and tokens come to.
"""

import itertools

import jax
from absl import flags

from experiments.measure import limits, study
from experiments.startup import options, program
from mtp_jax.decode import autotune, cache, layout
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model

_CONFIG = options.define_config()
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Rows at once.")
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens in the cache, by width.")
_CACHE_LEN = flags.DEFINE_integer("cache_len", 4096, "Most tokens, by cache.")
_CACHE_BATCH = flags.DEFINE_integer("cache_batch", 4, "Rows, by cache.")
_DTYPES = flags.DEFINE_list("dtypes", list(cache.DTYPES), "Caches to time.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Turns of each.", lower_bound=1)
_OUTPUT = options.define_output("JSON file for the results.")


def main(_: list[str]) -> None:
  """Times passes of a random model by width and by cache; writes JSON."""
  options.make_room(_OUTPUT.value)
  cfg = _CONFIG.value.check().model
  net = jax.jit(lambda key: model.Model(cfg, key))(jax.random.key(0))
  bandwidth = limits.bandwidth()
  result = study.provenance(seed=0) | {
    "parameters": sum(a.size for a in jax.tree.leaves(net)),
    "bandwidth": bandwidth,
    "width": by_width(net, bandwidth),
    "cache": by_cache(net, bandwidth),
  }
  study.write_json(_OUTPUT.value, result)
  print(tables(result))


def by_width(net, bandwidth: float) -> list[dict]:
  """A row per batch and chain of heads."""
  decoder, rows = layout.lay_out(net), []
  most = net.cfg.n_future
  chains = sorted({1, most} | {1 << i for i in range(most.bit_length())})
  trees = [tree_lib.chain(k) for k in chains if k <= most]
  for batch in map(int, _BATCHES.value):
    load = autotune.Load(batch, _LENGTH.value)
    seconds = autotune.seconds_per_pass(
      decoder, trees, load, repeats=_REPEATS.value
    )
    for tree, s in zip(trees, seconds, strict=True):
      read = limits.bytes_per_pass(decoder, tree, batch, _LENGTH.value)
      rows.append(
        {
          "batch": batch,
          "heads": tree.heads,
          "seconds": s,
          "over_ordinary": s / seconds[0],
          "of_bandwidth": read / s / bandwidth,
        }
      )
  return rows


def by_cache(net, bandwidth: float) -> list[dict]:
  """A row per dtype of the cache, tokens in it, and whether it has grown."""
  rows, ordinary = [], tree_lib.chain(1)
  batch = _CACHE_BATCH.value
  for dtype in _DTYPES.value:
    decoder = layout.lay_out(net, cache_dtype=dtype)
    for part, grown in itertools.product((8, 2, 1), (True, False)):
      # Room for the passes themselves.
      length = _CACHE_LEN.value // part - autotune.PASSES - 2
      load = autotune.Load(
        batch, length, cache_len=None if grown else _CACHE_LEN.value
      )
      (s,) = autotune.seconds_per_pass(
        decoder, [ordinary], load, repeats=_REPEATS.value
      )
      read = limits.bytes_per_pass(decoder, ordinary, batch, length)
      rows.append(
        {
          "dtype": dtype,
          "tokens": length,
          "grown": grown,
          "seconds": s,
          "of_bandwidth": read / s / bandwidth,
        }
      )
  return rows


def tables(result: dict) -> str:
  """Markdown of both."""
  lines = [
    "| batch | heads | ms per pass | over ordinary | of bandwidth |",
    "|---|---|---|---|---|",
  ]
  lines += [
    f"| {r['batch']} | {r['heads']} | {r['seconds'] * 1e3:.2f} | "
    f"{r['over_ordinary']:.2f} | {r['of_bandwidth']:.0%} |"
    for r in result["width"]
  ]
  lines += [
    "",
    "| cache | tokens in it | grown with the text | ms per pass | "
    "of bandwidth |",
    "|---|---|---|---|---|",
  ]
  lines += [
    f"| {r['dtype']} | {r['tokens']} | {'yes' if r['grown'] else 'no'} | "
    f"{r['seconds'] * 1e3:.2f} | "
    f"{r['of_bandwidth']:.0%} |"
    for r in result["cache"]
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  program.start(main)
