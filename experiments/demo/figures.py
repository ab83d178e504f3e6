"""What the demo measures: heads on held-out files, and decoding both ways."""

import functools

import numpy as np

from experiments.measure import timing
from mtp_jax.data import pipeline
from mtp_jax.decode import generate as generate_lib
from mtp_jax.evaluate import heads as head_measures


def score(net, cfg, held, batches: int) -> dict:
  """Held-out measures of every head over some batches, as plain lists."""
  batching = pipeline.Batching(
    cfg.data.batch, cfg.data.seq_len, cfg.model.reach, seed=1
  )
  found = head_measures.measure(
    net, (pipeline.batch_at(held, i, batching) for i in range(batches))
  )
  bits = found["nats"] / np.log(2) / held.bytes_per_token
  return {
    "bits_per_byte": bits.tolist(),
    "accuracy": found["accuracy"].tolist(),
    "predicted_tokens_per_forward": float(found["greedy"]),
    "tokens": batches * cfg.data.batch * cfg.data.seq_len,
  }


def decode(
  decoders, codec, prompts, *, heads: int, new: int, repeats: int
) -> list[dict]:
  """Tokens, passes, seconds and agreement with 1, 2, 4, ... and all heads.

  Each number of heads is a program that is compiled. Each prompt has a decoder,
  which may be the same for all.
  """

  def generate(k):
    return [
      generate_lib.generate(
        decoder, [prompt], heads=k, max_new=new, stop=codec.eos
      )
      for decoder, prompt in zip(decoders, prompts, strict=True)
    ]

  doubled = (2**i for i in range(heads.bit_length()))
  counts = sorted({*doubled, heads})
  calls = {k: functools.partial(generate, k) for k in counts}
  texts = {k: call() for k, call in calls.items()}  # compiles
  seconds = timing.seconds_in_turns(calls, repeats)
  entries = []
  for k in counts:
    rows = texts[k]
    per_pass = np.concatenate([r.per_pass[0] for r in rows])
    entries.append(
      {
        "heads": k,
        "tokens": [r.tokens[0].tolist() for r in rows],
        "per_pass": [r.per_pass[0].tolist() for r in rows],
        "tokens_per_forward": float(per_pass.mean()),
        "accepted": [float((per_pass > j).mean()) for j in range(k)],
        "seconds": seconds[k],
        "tokens_per_second": sum(len(r.tokens[0]) for r in rows)
        / float(np.median(seconds[k])),
        "speedup": timing.median_ratio(seconds[1], seconds[k]),
        "differences": differences(texts[1], rows),
      }
    )
  return entries


def differences(ordinary, other) -> list[dict]:
  """Where texts part, and the margin of ordinary decoding's choice there."""
  found = []
  for i, (a, b) in enumerate(zip(ordinary, other, strict=True)):
    a, b = a.texts[0], b.texts[0]
    if np.array_equal(a.tokens, b.tokens):
      continue
    size = min(len(a.tokens), len(b.tokens))
    unequal = a.tokens[:size] != b.tokens[:size]
    place = int(np.argmax(np.append(unequal, True)))
    found.append(
      {"prompt": i, "token": place, "margin": float(a.margin[place])}
    )
  return found
