"""Polynomials over F_7 modulo X^5 (paper, figures 8, S15, S16; table S13).

  python -m experiments.train --config=configs/paper/arithmetic.py:30M-n4 \\
    --workdir=runs/arithmetic-30M-n4 --config.train.accumulate=256

30M and 100M, non-embedding, by n = 1, 2, 4; two runs each in the paper:
--config.train.seed=1.
Tokens: 26.2 billion, in contexts of 1024 (30M) and 2048 (100M).
Corpus: documents in ArrayRecord files in data/arithmetic, the pause tokens of
figure S15 written into them. The paper gives neither their form nor its
vocabulary. Bytes are ours: a coefficient modulo 7 is one id, and so is a
sign. Transformer heads, unlike the byte models of code.
Expected: n = 2 and 4 above n = 1 within and beyond the trained 5 operations
(figure 8, no number printed).
Planned slice: v5e:1x1 for all (experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

CONTEXTS = {"30M": 1024, "100M": 2048}
RUNS = tuple(f"{size}-n{n}" for size in CONTEXTS for n in (1, 2, 4))


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  size, n, _ = base.choose(name, RUNS)
  cfg = base.run(
    size,
    n,
    "arithmetic",
    batch=0.25,
    steps=100_000,
    peak=1e-4,
    seq_len=CONTEXTS[size],
  )
  return cfg.replace(model={"vocab": 259}, data={"tokenizer": "bytes"})
