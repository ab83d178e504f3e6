"""The config of a small run on a corpus of its own."""

import json
import pathlib
import random

from mtp_jax import config

STEPS, SAVE_EVERY = 50, 2


def corpus(folder: pathlib.Path) -> pathlib.Path:
  """Writes 60 documents of 99 words; their file."""
  rng = random.Random(0)
  words = ["def", "return", "if", "x", "y", "(", ")", "\n", "    "]
  rows = [" ".join(rng.choices(words, k=99)) for _ in range(60)]
  path = folder / "corpus.jsonl"
  path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
  return path


def make(folder: pathlib.Path) -> pathlib.Path:
  """Writes a corpus and the config of a small run on it; the folder."""
  cfg = config.Config(
    model=config.Model(
      width=20, mlp=28, layers=2, attn_heads=2, kv_heads=1, n_future=3,
      head="unembedding",
    ),
    data=config.Data(
      source="jsonl", path=str(corpus(folder)), cache=str(folder / "cache"),
      seq_len=31, batch=3, held_out=0.1,
    ),
    optim=config.Optim(warmup=5, peak=1e-2),
    train=config.Train(
      steps=STEPS, save_every=SAVE_EVERY, log_every=1, eval_every=25,
      eval_batches=2, sample_tokens=11, max_bad_steps=4,
    ),
  )  # fmt: skip
  (folder / "config.json").write_text(config.to_json(cfg.check()))
  return folder
