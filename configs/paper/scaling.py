"""Model size against n, on code (paper, figure 3; tables S7, S13, S14).

  python -m experiments.train --config=configs/paper/scaling.py:13B-n4 \\
    --workdir=runs/13B-n4 --config.train.accumulate=64

Six sizes by n = 1, 2, 4, all with L layers, the heads' own included.
Tokens: 91.0 billion up to 3B, 209.7 billion for 6.7B and 13B.
Corpus: the paper names none. ArrayRecord files of source code in data/code
and a SentencePiece model of 32,000 words in data/tokenizer.model.
Expected (table S7): pass@1 on MBPP of 13B is 26.0, 30.5 and 30.5 for n = 1, 2
and 4; of 0.3B 1.8, 1.7 and 1.0.
Planned slices: v5e:1x1 for 0.3B and 0.6B, v5e:2x2 for 1.3B, v5e:2x4 for 3B,
v5e:4x4 for 6.7B, v5e:4x8 for 13B, of any n
(experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

STEPS = {
  "0.3B": 10_850,
  "0.6B": 10_850,
  "1.3B": 10_850,
  "3B": 10_850,
  "6.7B": 25_000,
  "13B": 25_000,
}
RUNS = tuple(f"{size}-n{n}" for size in STEPS for n in (1, 2, 4))


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  size, n, _ = base.choose(name, RUNS)
  warmup = 2000 if size == "6.7B" else 1000
  return base.run(size, n, "code", batch=8, steps=STEPS[size], warmup=warmup)
