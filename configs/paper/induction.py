"""Induction in children's stories (paper, figures 7, S14; tables S13, S14).

  python -m experiments.train --config=configs/paper/induction.py:30M-n2 \\
    --workdir=runs/induction-30M-n2 --config.train.accumulate=128

Seven sizes, non-embedding, by n = 1, 2; with `-books` on books and stories
9 to 1 (appendix J). Two seeds each in the paper: --config.train.seed=1.
Tokens: 26.2 billion, in twice the batch and half the steps for `-books`. The
paper stops early, by the test metric; these run to their end.
Corpus: the paper names none. ArrayRecord files in data/stories or
data/books_and_stories. A name takes two tokens, so words are needed: 32,000
in data/tokenizer.model, a number that the paper gives for its code models.
Expected: n = 2 far better up to 30M, no better from 100M on (figure 7, no
number printed).
Planned slices: v5e:1x1 up to 300M, v5e:2x2 for 1B
(experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

SIZES = ("1M", "3M", "10M", "30M", "100M", "300M", "1B")
RUNS = tuple(
  f"{size}-n{n}{corpus}"
  for corpus in ("", "-books")
  for size in SIZES
  for n in (1, 2)
)


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  size, n, books = base.choose(name, RUNS)
  return base.run(
    size,
    n,
    "books_and_stories" if books else "stories",
    batch=0.5 if books else 0.25,
    steps=50_000 if books else 100_000,
    peak=1e-4,
    seq_len=2048,
  )
