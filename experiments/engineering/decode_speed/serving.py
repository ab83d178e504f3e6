"""Many prompts through the server: what 'auto' takes, beside its rivals."""

import functools
import statistics

from absl import logging

from experiments.measure import compare, timing
from mtp_jax.decode import autotune, serve


def measure(
  decoder,
  options: list[autotune.Option],
  chosen: autotune.Option,
  work: compare.Work,
) -> dict:
  """A row per topology: seconds, speed over ordinary decoding, 'auto' or not.

  Times `serve.generate_all`, reading included, in alternating turns: ordinary
  decoding, every chain, what 'auto' takes, and the smallest built tree.

  Args:
    decoder: from `mtp_jax.lay_out`.
    options: from `autotune.options` at this batch, ordinary decoding among
      them.
    chosen: the one that 'auto' takes.
    work: prompts, rows at once, new tokens, and turns of each.
  """
  branching = [o for o in options if not o.tree.is_chain]
  options = [
    o for o in options if o.tree.is_chain or o in (chosen, *branching[:1])
  ]

  def serve_all(tree):
    return serve.generate_all(
      decoder, work.prompts, rows=work.batch, heads=tree, max_new=work.new
    )

  calls = {o.tree: functools.partial(serve_all, o.tree) for o in options}
  results = {tree: call() for tree, call in calls.items()}  # compiles
  times = timing.seconds_in_turns(calls, work.repeats)
  (ordinary,) = (o for o in options if not o.tree.max_depth)
  rows = {}
  for option in options:
    seconds, result = times[option.tree], results[option.tree]
    gain = option.tokens_per_second / ordinary.tokens_per_second
    name = compare.name(option.tree)
    rows[name] = {
      "seconds": seconds,
      "tokens_per_second": sum(map(len, result.tokens))
      / statistics.median(seconds),
      "speedup": timing.median_ratio(times[ordinary.tree], seconds),
      "predicted_speedup": gain,
      "tokens_per_forward": result.tokens_per_forward,
      "predicted_tokens_per_forward": option.tokens_per_forward,
      "auto": option == chosen,
    }
    logging.info("%d rows, %s: %.2f", work.batch, name, rows[name]["speedup"])
  return {"prompts": len(work.prompts), "rows": rows}
