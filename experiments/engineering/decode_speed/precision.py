"""What fewer bits change: in the heads that draft, and in the cache."""

import jax
import numpy as np

from experiments.measure import compare
from mtp_jax.decode import generate, layout


def drafts(net, codec, prompts, new, trees) -> dict:
  """Tokens per forward with drafting heads in fewer bits; the texts agree."""
  tree, found = trees[-1], {}
  for dtype in (None, "bfloat16", "int8"):
    decoder = layout.lay_out(net, codec.vocab, draft_dtype=dtype)
    row = {}
    for name, heads in (("chain", net.cfg.n_future), ("tree", tree)):
      result = generate.generate(decoder, prompts, heads=heads, max_new=new)
      row[name] = result.tokens_per_forward
      row[f"{name}_texts"] = result.tokens
    found[str(dtype)] = row
  base = found["None"]
  return {
    dtype: {
      "chain": row["chain"],
      "tree": row["tree"],
      "same_texts": all(
        np.array_equal(a, b)
        for name in ("chain_texts", "tree_texts")
        for a, b in zip(row[name], base[name], strict=True)
      ),
    }
    for dtype, row in found.items()
  }


def caches(net, codec, prompts, new) -> dict:
  """What a smaller cache does to texts and to their probability."""
  found, base = {}, None
  for dtype in ("float32", "bfloat16", "int8"):
    decoder = layout.lay_out(net, codec.vocab, cache_dtype=dtype)
    result = generate.generate(decoder, prompts, heads=1, max_new=new)
    cache = jax.eval_shape(lambda d: d.empty_cache(1, 1024, 1), decoder)
    base = result if base is None else base
    common = [
      compare.common(a, b)
      for a, b in zip(result.tokens, base.tokens, strict=True)
    ]
    found[dtype] = {
      "bytes_per_token": sum(
        a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)
      )
      / 1024,
      "same_texts": float(np.mean([c == new for c in common])),
      "tokens_before_the_first_difference": float(np.mean(common)),
      "largest_change_of_a_logprob": max(
        float(np.abs(a.logprob[:c] - b.logprob[:c]).max(initial=0))
        for a, b, c in zip(result.texts, base.texts, common, strict=True)
      ),
    }
  return found
