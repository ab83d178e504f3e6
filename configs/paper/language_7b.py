"""7B on natural language (paper, figures 5 and 6; tables S2, S9, S13).

  python -m experiments.train --config=configs/paper/language_7b.py:500B-n4 \\
    --workdir=runs/language-500B-n4 --config.train.accumulate=128

Two budgets by n = 1, 2, 4.
Tokens: 209.7 and 503.3 billion.
Corpus: the paper names none. ArrayRecord files of text in data/language and a
SentencePiece model of 32,000 words in data/tokenizer.model.
Expected: on multiple-choice benchmarks n = 2 as good as n = 1, n = 4 a little
worse (figure 5, no number printed); 500B-n4 writes 3.12 tokens per forward
pass on Wikipedia with four heads (table S2).
Planned slice: v5e:4x4 for all (experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

STEPS = {"200B": 25_000, "500B": 60_000}
RUNS = tuple(f"{budget}-n{n}" for budget in STEPS for n in (1, 2, 4))


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  budget, n, _ = base.choose(name, RUNS)
  return base.run("6.7B", n, "language", batch=8, steps=STEPS[budget], end=0.1)
