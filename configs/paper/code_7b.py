"""7B on code: budgets, n and kinds of head (paper, tables 1, S4, S13).

  python -m experiments.train --config=configs/paper/code_7b.py:1T-n4 \\
    --workdir=runs/1T-n4 --config.train.accumulate=112

200B-n1, n2, n4, n6, n8: table 1. 200B-n4-linear, -causal, -anticausal, and
-plus3, the parallel heads with three trunk layers more: table S4. 1T-n1, n4:
table 1. 500B: table S13 has its row and no table its result; n = 1 and 4 are
our choice. Linear heads are no layers, so 32 remain in the trunk (ours).
Table S6, which goes on from Llama 2, is in llama2_heads.py.
Tokens: 209.7, 503.3 and 1000.0 billion.
Corpus: the paper names none. ArrayRecord files of source code in data/code
and a SentencePiece model of 32,000 words in data/tokenizer.model.
Expected (table 1): pass@1 on MBPP 30.0 for 200B-n1, 33.8 for 200B-n4, 40.7
for 1T-n1, 43.1 for 1T-n4.
Planned slice: v5e:4x4 for all (experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

BUDGETS = {"200B": (8, 25_000), "500B": (7, 68_570), "1T": (7, 136_240)}
RUNS = (
  *(f"200B-n{n}" for n in (1, 2, 4, 6, 8)),
  *(f"200B-n4-{kind}" for kind in ("linear", "causal", "anticausal", "plus3")),
  *(f"{budget}-n{n}" for budget in ("500B", "1T") for n in (1, 4)),
)


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  budget, n, kind = base.choose(name, RUNS)
  batch, steps = BUDGETS[budget]
  cfg = base.run("6.7B", n, "code", batch=batch, steps=steps)
  if kind == "plus3":
    return cfg.replace(model={"extra_layers": 3})
  return cfg.replace(model={"head": kind}) if kind else cfg
