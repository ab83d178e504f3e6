"""Llama 2 trained on with four heads (paper, table S6).

  python -m experiments.train --config=configs/paper/llama2_heads.py:7B-n4 \\
    --init=llama-2-7b --config.model.n_future=4 --config.model.layers=32 \\
    --workdir=runs/llama2-n4 --config.train.accumulate=128

--init takes a folder of Llama 2 (Hugging Face or Meta), its tokenizer
included. The flags make its heads; with --init the section `model` here only
says what comes of them:
7B-n1: no flag. 7B-n4-plus3: n_future=4, heads 2 to 4 are layers more. 7B-n4:
and layers=32, so the last three layers of the trunk are left out.
7B-n4-linear: n_future=4 and head=linear.
New heads are copies of head 1, linear ones the identity (ours; not stated).
The caption names no size; 7B by the context. Table S13 has no row for these
runs: rates, batch and steps are those of 200B in code_7b.py (ours).
Tokens: 209.7 billion.
Corpus: the paper names none. ArrayRecord files of source code in data/code.
Expected (table S6): pass@1 on MBPP 39.6 for 7B-n1, 39.3 for 7B-n4-linear,
38.3 for 7B-n4, 42.5 for 7B-n4-plus3.
Planned slice: v5e:4x4 for all (experiments/engineering/paper_plans).
"""

from configs.paper import base, code_7b
from mtp_jax import config

RUNS = ("7B-n1", "7B-n4-linear", "7B-n4", "7B-n4-plus3")


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  base.choose(name, RUNS)
  cfg = code_7b.get_config(name.replace("7B", "200B"))
  return cfg.replace(train={"finetune": True})
