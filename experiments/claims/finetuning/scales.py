"""How much is trained and sampled at each scale.

The paper's own are configs/paper/code_7b.py and codecontests.py.
"""

import dataclasses

from experiments.claims.finetuning import ways
from mtp_jax import config


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the claim, and of `summarisation`."""

  before: config.Config  # of pretraining, for any n
  steps: int  # of finetuning
  peak: float  # learning rate of finetuning
  documents: int  # to finetune on
  seeds: int
  problems: int  # held out
  samples: int  # of each problem at each temperature
  temperatures: tuple[float, ...]
  rows: int = 64  # samples at once

  def after(self, data: config.Data) -> config.Config:
    """The config of finetuning on the documents of `data`, for any n."""
    section = dataclasses.asdict(data)
    for name in ("seq_len", "batch"):
      section[name] = getattr(self.before.data, name)
    return self.before.replace(
      data=section,
      optim={"peak": self.peak, "warmup": max(1, self.steps // 20)},
      train={
        "steps": self.steps,
        "eval_every": self.steps,
        "save_every": self.steps,
      },
    )


SCALES = {
  "test": Scale(
    before=ways.pretrain(
      width=16, layers=2, batch=2, steps=2, max_bytes=200_000
    ).replace(
      data={"seq_len": 64, "held_out": 0.3},
      optim={"warmup": 1},
      train={"eval_batches": 1},
    ),
    steps=2,
    peak=2e-3,
    documents=40,
    seeds=1,
    problems=2,
    samples=2,
    temperatures=(0.8,),
    rows=4,
  ),
  "cpu": Scale(
    before=ways.pretrain(
      width=64, layers=3, batch=4, steps=500, max_bytes=30_000_000
    ),
    steps=700,
    peak=3e-3,
    documents=10_000,
    seeds=3,
    problems=32,
    samples=16,
    temperatures=(0.2, 0.8),
  ),
  "gpu": Scale(
    before=ways.pretrain(
      width=384, layers=6, batch=64, steps=2000, max_bytes=200_000_000
    ).replace(optim={"peak": 3e-3}),
    steps=1000,
    peak=1e-3,
    documents=200_000,
    seeds=3,
    problems=200,
    samples=100,
    temperatures=(0.2, 0.5, 0.8),
    rows=512,
  ),
}
