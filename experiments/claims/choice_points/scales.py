"""How much is trained at each scale."""

import dataclasses

from mtp_jax import config
from mtp_jax.tasks import choice_points


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the experiment."""

  language: choice_points.Language
  heads: tuple[int, ...]  # n of each model
  seeds: tuple[int, ...]
  width: int  # D; the feed-forward width is twice that
  batch: int  # documents of a step, all of them new
  steps: tuple[int, ...]  # of training, after which weights are measured
  peak: float  # learning rate
  measured: int  # documents that weights are measured on

  def config(self, n: int, seed: int) -> config.Config:
    """The settings of one run: two trunk layers under n heads."""
    return (
      config.Config()
      .replace(
        model={
          "vocab": choice_points.VOCAB,
          "width": self.width,
          "mlp": 2 * self.width,
          "layers": 2 + n,
          "attn_heads": 2,
          "kv_heads": 2,
          "n_future": n,
        },
        data={"batch": self.batch, "seq_len": self.language.tokens - n},
        optim={"peak": self.peak, "warmup": 1, "decay": 0.0},
        train={"steps": max(2, *self.steps), "seed": seed},
        mesh={"data": 1},
      )
      .check()
    )


SCALES = {
  "test": Scale(
    choice_points.Language(letters=2, tail=1, blocks=6),
    heads=(1, 2),
    seeds=(0,),
    width=8,
    batch=2,
    steps=(0, 2),
    peak=1e-2,
    measured=4,
  ),
  "cpu": Scale(
    choice_points.Language(letters=8, tail=7, blocks=8),
    heads=(1, 2, 4, 8),
    seeds=(0, 1),
    width=32,
    batch=16,
    steps=(0, 30, 300),
    peak=3e-3,
    measured=256,
  ),
}
