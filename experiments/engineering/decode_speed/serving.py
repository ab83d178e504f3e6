"""Many prompts through the server: what 'auto' takes, beside its rivals."""

import statistics
import time

from absl import logging

from experiments.engineering.decode_speed import report
from mtp_jax.decode import choose, serve


def measure(
  decoder,
  options: list[choose.Option],
  chosen: choose.Option,
  prompts,
  *,
  slots: int,
  new: int,
  repeats: int,
) -> dict:
  """A row per topology: seconds, speed over ordinary decoding, 'auto' or not.

  Times `serve.generate_all`, reading included, in alternating turns: ordinary
  decoding, every chain, what 'auto' takes, and the smallest built tree.

  Args:
    decoder: from `prepare.decoder`.
    options: from `choose.options` at this batch, ordinary decoding among them.
    chosen: the one that 'auto' takes.
    prompts: to continue by `new` tokens each.
    slots: rows at once.
    new: tokens.
    repeats: turns of each.
  """
  branching = [o for o in options if not o.tree.is_chain]
  options = [
    o for o in options if o.tree.is_chain or o in (chosen, *branching[:1])
  ]

  def turn(tree):
    begin = time.perf_counter()
    found = serve.generate_all(
      decoder, prompts, slots=slots, heads=tree, max_new=new
    )
    return time.perf_counter() - begin, found

  results = [turn(o.tree)[1] for o in options]  # compiles
  times = [[turn(o.tree)[0] for o in options] for _ in range(repeats)]
  first = next(i for i, o in enumerate(options) if not o.tree.drafts)
  rows = {}
  for i, option in enumerate(options):
    seconds = [t[i] for t in times]
    gain = option.tokens_per_second / options[first].tokens_per_second
    name = report.name(option.tree)
    rows[name] = {
      "seconds": seconds,
      "tokens_per_second": sum(map(len, results[i].tokens))
      / statistics.median(seconds),
      "speedup": statistics.median(t[first] / t[i] for t in times),
      "predicted_speedup": gain,
      "tokens_per_forward": results[i].tokens_per_forward,
      "predicted_tokens_per_forward": option.tokens_per_forward,
      "auto": option == chosen,
    }
    logging.info("%d slots, %s: %.2f", slots, name, rows[name]["speedup"])
  return {"prompts": len(prompts), "rows": rows}
