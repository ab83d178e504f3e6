"""Finetuning 7B on summaries (paper, figure 6; tables S8 to S10, S13).

  python -m experiments.train \\
    --config=configs/paper/summarisation.py:xsum-n2 \\
    --init=runs/language-200B-n2 --workdir=runs/xsum-n2 \\
    --config.train.accumulate=2

The paper starts from the runs of language_7b.py, 200B and 500B, of the same n.
Nine corpora by n = 1, 2, 4; n heads in finetuning too (ours; not stated).
Tokens: table S13, 8 million (SAMSum) to 10.1 billion (BigPatent).
Three epochs, saved at the end of each, of which the paper takes the one with
the best ROUGE-L; BigPatent is one epoch, and has no result in the paper.
Warm-up takes 100 steps and SAMSum's run 60: it ends on the way up.
Corpus: JSONL files in data/summarisation/<name>, a text in `prompt` and its
summary in `answer` (`mtp_jax.tasks.summaries` makes them of the sets' own
files). The paper gives no form; the loss is on the summary alone (ours).
Expected (table S9): ROUGE-L on average 26.23, +0.51 and +0.46 for n = 1, 2, 4
after 200B; 27.08, +0.28 and +0.31 after 500B.
Planned slice: v5e:4x4 for all (experiments/engineering/paper_plans).
"""

from configs.paper import base
from mtp_jax import config

STEPS = {
  "bigpatent": 76_680,
  "cnn_dm": 7_140,
  "multi_news": 3_330,
  "orangesum": 360,
  "pn_summary": 3_450,
  "samsum": 60,
  "thaisum": 23_640,
  "wikisummary": 2_550,
  "xsum": 2_760,
}
RUNS = tuple(f"{corpus}-n{n}" for corpus in STEPS for n in (1, 2, 4))


def get_config(name: str = "") -> config.Config:
  """The run `name` of `RUNS`; ValueError lists them for another name."""
  corpus, n, _ = base.choose(name, RUNS)
  steps = STEPS[corpus]
  warmup = min(100, steps - 1)
  cfg = base.run(
    "6.7B",
    n,
    f"summarisation/{corpus}",
    batch=0.125,
    steps=steps,
    warmup=warmup,
    peak=3e-5 * warmup / 100,  # the same slope, cut short
  )
  cfg = cfg.replace(
    data=base.PAIRS | {"loss_on": "answer"}, train={"finetune": True}
  )
  if corpus != "bigpatent":
    epoch = steps // 3
    cfg = cfg.replace(train={"eval_every": epoch, "save_every": epoch})
  return cfg
