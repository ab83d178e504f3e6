"""Finetuning 7B on CodeContests (paper, figure 4, appendix F; table S13).

  python -m experiments.train \\
    --config=configs/paper/codecontests.py:7B-n4 --init=runs/1T-n4 \\
    --workdir=runs/contests-n4 --config.train.accumulate=4

The paper starts from its 7B models of code and does not say which; we take
those of 1T tokens (code_7b.py).
7B-n1: one token in both trainings, --init=runs/1T-n1. 7B-n4: four in both.
7B-n4-head1: trained on four and finetuned on the next token alone, with
--config.model.n_future=1; without the other three heads, 29 of the 32 layers
remain (derived, not stated).
Tokens: 3.41 billion, which is batch x steps; table S13 prints 3.6.
Corpus: Python solutions of the train split, correct and incorrect, as JSONL
files in data/codecontests, which `pairs.write(file, problem_files.solutions(
path))` of `mtp_jax.tasks` makes. `prompt` is the problem after a line that says
which of the two the solution is, and `answer` the solution. The paper gives
neither form; the loss is on both (ours).
Expected: both that were trained on four above 7B-n1 at every k of pass@k, and
7B-n4-head1 the best (figure 4, no number printed).
Planned slice: v5e:4x4 for all (experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

RUNS = ("7B-n1", "7B-n4", "7B-n4-head1")


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  _, n, head1 = base.choose(name, RUNS)
  cfg = base.run(
    "6.7B",
    n,
    "codecontests",
    batch=0.25,
    steps=13_000,
    warmup=400,
    peak=5e-5,
    end=0.004,
  )
  cfg = cfg.replace(
    optim={"clip": 0.1}, data=base.PAIRS, train={"finetune": True}
  )
  if head1:
    layers = cfg.model.layers - (n - 1)
    cfg = cfg.replace(model={"n_future": 1, "layers": layers})
  return cfg
