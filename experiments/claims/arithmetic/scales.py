"""How much is trained and tested at each scale."""

import dataclasses

from configs import sizes
from configs.paper import arithmetic as paper
from configs.paper import base
from mtp_jax import config


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one sweep."""

  # name -> (D, L, H), the heads' layers among L; the first is run first.
  shapes: dict[str, tuple[int, int, int]]
  futures: tuple[int, ...]  # n
  # Numbers of pause tokens; all but the first are run at the first size only.
  pauses: tuple[int, ...]
  seeds: int
  trained: int  # operations of training expressions: 1 to this
  tested: int  # of test expressions
  expressions: int  # test expressions of each number of operations
  batch: int  # B
  seq_len: int  # T
  steps: int
  per_call: int  # steps of one call
  peak: float  # learning rate
  evaluations: int  # of head 1, in equal distances
  rows: int  # test expressions of one pass
  answers_only: bool = True  # the question's tokens are not learnt
  dtype: str = "float32"

  def config(self, size: str, n: int, seed: int) -> config.Config:
    """The config of one run."""
    width, layers, attn_heads = self.shapes[size]
    return config.Config(
      model=config.Model(
        width=width,
        mlp=-(-8 * width // 3 // 64) * 64,
        layers=layers,
        attn_heads=attn_heads,
        kv_heads=attn_heads,
        n_future=n,
        dtype=self.dtype,
        attention="xla",  # short rows
      ),
      data=config.Data(batch=self.batch, seq_len=self.seq_len),
      optim=config.Optim(peak=self.peak, warmup=self.steps // 20),
      train=config.Train(steps=self.steps, loss_block=self.seq_len, seed=seed),
    )


@dataclasses.dataclass(frozen=True)
class Paper(Scale):
  """The paper's runs: `configs/paper/arithmetic.py`."""

  def config(self, size: str, n: int, seed: int) -> config.Config:
    """As in `configs/paper`, on one device, a row in each microbatch."""
    cfg = paper.get_config(f"{size}-n{n}").replace(train={"seed": seed})
    return base.one_row_per_chip(cfg, 1)


_SMALL = dict(futures=(1, 2, 4), pauses=(0, 5, 10), trained=5, tested=10)

SCALES = {
  "test": Scale(
    shapes={"tiny": (16, 3, 2)},
    futures=(1, 2),
    pauses=(0, 5),
    seeds=1,
    trained=1,
    tested=2,
    expressions=5,
    batch=2,
    seq_len=40,
    steps=4,
    per_call=2,
    peak=1e-3,
    evaluations=2,
    rows=4,
  ),
  "cpu": Scale(
    shapes={"0.3M": (64, 5, 2), "0.1M": (36, 5, 2)},
    futures=(1, 2, 4),
    pauses=(0, 5, 10),
    seeds=2,
    trained=2,
    tested=4,
    expressions=200,
    batch=16,
    seq_len=64,
    steps=2400,
    per_call=100,
    peak=3e-3,
    evaluations=4,
    rows=200,
  ),
  "gpu": Scale(
    **_SMALL,
    shapes={"7M": (256, 8, 8), "2M": (128, 8, 4)},
    seeds=2,
    expressions=2000,
    batch=64,
    seq_len=128,
    steps=4000,
    per_call=250,
    peak=1e-3,
    evaluations=4,
    rows=1000,
    dtype="bfloat16",
  ),
  "paper": Paper(
    **_SMALL,
    shapes={name: sizes.SIZES[name] for name in paper.CONTEXTS},
    seeds=2,
    expressions=2000,
    batch=256,  # of 30M; the config has that of each size
    seq_len=1024,
    steps=100_000,
    per_call=20,
    peak=1e-4,
    evaluations=50,
    rows=1000,
    answers_only=False,
  ),
}
