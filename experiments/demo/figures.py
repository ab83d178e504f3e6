"""What the demo measures: heads on held-out files, and decoding both ways."""

import functools

import numpy as np

from experiments.measure import timing
from mtp_jax.data import pipeline
from mtp_jax.decode import generate as generate_lib
from mtp_jax.evaluate import heads as head_measures


def score(net, cfg, held, batches: int) -> dict:
  """Held-out measures of every head over some batches, as plain lists."""
  shape = dict(
    batch=cfg.data.batch,
    seq_len=cfg.data.seq_len,
    n_future=cfg.model.reach,
    seed=1,
  )
  found = head_measures.measure(
    net, (pipeline.batch_at(held, i, **shape) for i in range(batches))
  )
  bits = found["nats"] / np.log(2) / held.bytes_per_token
  return {
    "bits_per_byte": bits.tolist(),
    "accuracy": found["accuracy"].tolist(),
    "predicted_tokens_per_forward": float(found["greedy"]),
    "tokens": batches * cfg.data.batch * cfg.data.seq_len,
  }


def decode(
  net, decoder, codec, prompts, *, new: int, repeats: int
) -> list[dict]:
  """One entry per number of heads: tokens, passes, seconds, agreement."""
  counts = range(1, net.cfg.drafting + 1)

  def generate(heads):
    return [
      generate_lib.generate(
        decoder, [prompt], heads=heads, max_new=new, stop=codec.eos
      )
      for prompt in prompts
    ]

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
        "differences": differences(net, prompts, texts[1], rows),
      }
    )
  return entries


def differences(net, prompts, ordinary, other) -> list[dict]:
  """Where texts part, with the top-two margin of head 1 at that place."""
  found = []
  for i, (prompt, a, b) in enumerate(
    zip(prompts, ordinary, other, strict=True)
  ):
    a, b = a.tokens[0], b.tokens[0]
    if np.array_equal(a, b):
      continue
    size = min(len(a), len(b))
    place = int(np.argmax(np.append(a[:size] != b[:size], True)))
    before = np.array([[*prompt, *a[:place]]], np.int32)
    best = np.sort(np.asarray(net(before)[0, 0, -1]))
    found.append(
      {"prompt": i, "token": place, "margin": float(best[-1] - best[-2])}
    )
  return found
