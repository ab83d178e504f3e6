"""How much is trained at each scale."""

import dataclasses

from mtp_jax import config
from mtp_jax.tasks import star_graph


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the experiment."""

  graphs: tuple[star_graph.Shape, ...]
  heads: tuple[int, ...]  # n of each model
  seeds: tuple[int, ...]
  width: int  # D; the feed-forward width is twice that
  trunk: int  # layers below the heads, the same for every n
  attn_heads: int
  batch: int  # graphs of a step, all of them new
  steps: int  # of training, at most
  peak: float  # learning rate of the matrices (Muon)
  every: int  # steps between two measurements
  held: int  # graphs that are measured on
  dtype: str = "float32"

  def config(self, graph: star_graph.Shape, n: int, seed: int) -> config.Config:
    """The settings of one run; every n has the same trunk under its heads."""
    return (
      config.Config()
      .replace(
        model={
          "vocab": star_graph.VOCAB,
          "width": self.width,
          "mlp": 2 * self.width,
          "layers": self.trunk + n,
          "attn_heads": self.attn_heads,
          "kv_heads": self.attn_heads,
          "n_future": n,
          "dtype": self.dtype,
        },
        data={"batch": self.batch, "seq_len": graph.tokens - 1},
        optim={
          "kind": "muon",
          "peak": self.peak,
          "adam_ratio": 3.0,
          "warmup": min(100, self.steps - 1),
          "end": 0.1,
          "decay": 0.03,
        },
        train={"steps": self.steps, "seed": seed},
        mesh={"data": 1},
      )
      .check()
    )


SCALES = {
  "test": Scale(
    graphs=(star_graph.Shape(2, 3, 5),),
    heads=(1, 2),
    seeds=(0,),
    width=16,
    trunk=1,
    attn_heads=2,
    batch=4,
    steps=4,
    peak=5e-3,
    every=2,
    held=8,
  ),
  "cpu": Scale(
    graphs=(star_graph.Shape(2, 4, 10),),
    heads=(1, 4, 2, 8),
    seeds=(0, 1),
    width=64,
    trunk=3,
    attn_heads=4,
    batch=64,
    steps=1500,
    peak=5e-3,
    every=200,
    held=512,
  ),
  "gpu": Scale(
    graphs=(
      star_graph.Shape(2, 5, 20),
      star_graph.Shape(5, 5, 50),
      star_graph.Shape(2, 4, 10),  # that of scale cpu
    ),
    heads=(1, 4, 8, 2),
    seeds=(0, 1),
    width=128,
    trunk=4,
    attn_heads=4,
    batch=256,
    steps=6000,
    peak=4e-3,
    every=250,
    held=2048,
  ),
}
