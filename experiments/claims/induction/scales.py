"""How much is trained and tested at each scale."""

import dataclasses

from configs import sizes
from configs.paper import base
from configs.paper import induction as paper
from mtp_jax import config


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one sweep.

  One row of T tokens holds whole stories, of those that are built in.
  """

  sizes: tuple[str, ...]  # of table S14, or of `_SMALL`
  futures: tuple[int, ...]  # n
  seeds: int
  # Sizes that are also trained on a mixture, nine tenths of it books (S14).
  mixed: tuple[str, ...]
  names: int  # names in the training stories
  tokens: int  # of the training corpus, which is read in epochs
  test: int  # stories
  batch: int  # B
  seq_len: int  # T
  steps: int
  per_call: int  # steps of one call
  peak: float  # learning rate
  evaluations: int  # in equal distances; the best is what counts
  dtype: str = "float32"

  def config(
    self, size: str, n: int, seed: int, vocab: int, books: float
  ) -> config.Config:
    """The config of one run; `vocab` is that of its corpus."""
    del books
    shape = _SMALL.get(size) or sizes.model(size)
    return config.Config(
      model=dataclasses.replace(
        shape, n_future=n, vocab=vocab, dtype=self.dtype, attention="xla"
      ),
      data=config.Data(batch=self.batch, seq_len=self.seq_len),
      optim=config.Optim(peak=self.peak, warmup=max(1, self.steps // 20)),
      train=config.Train(
        steps=self.steps, loss_block=min(self.seq_len, 256), seed=seed
      ),
    )


@dataclasses.dataclass(frozen=True)
class Paper(Scale):
  """The paper's runs: `configs/paper/induction.py`, on our ids."""

  def config(
    self, size: str, n: int, seed: int, vocab: int, books: float
  ) -> config.Config:
    """As in `configs/paper`, on one device, a row in each microbatch."""
    cfg = paper.get_config(f"{size}-n{n}" + "-books" * (books > 0))
    cfg = cfg.replace(model={"vocab": vocab}, train={"seed": seed})
    return base.one_row_per_chip(cfg, 1)


BOOKS = 0.9  # of a mixture's tokens

_SMALL = {  # below table S14
  "tiny": config.Model(width=32, mlp=64, layers=3, attn_heads=2, kv_heads=2),
}

SCALES = {
  "test": Scale(
    sizes=("tiny",),
    futures=(1, 2),
    seeds=1,
    mixed=("tiny",),
    names=50,
    tokens=2000,
    test=5,
    batch=2,
    seq_len=256,
    steps=4,
    per_call=2,
    peak=1e-3,
    evaluations=2,
  ),
  "cpu": Scale(
    sizes=("1M", "3M"),
    futures=(1, 2),
    seeds=2,
    mixed=("1M",),
    names=1000,
    tokens=500_000,
    test=100,
    batch=4,
    seq_len=192,
    steps=3000,
    per_call=100,
    peak=2e-3,
    evaluations=15,
  ),
  "gpu": Scale(
    sizes=("1M", "3M", "10M", "30M", "100M"),
    futures=(1, 2),
    seeds=2,
    mixed=("1M", "3M", "10M", "30M", "100M"),
    names=1000,
    tokens=5_000_000,
    test=200,
    batch=64,
    seq_len=256,
    steps=2500,
    per_call=100,
    peak=1e-3,
    evaluations=25,
    dtype="bfloat16",
  ),
  # Stories are ours, or those of --stories.
  "paper": Paper(
    sizes=paper.SIZES,
    futures=(1, 2),
    seeds=2,
    mixed=paper.SIZES,
    names=1000,
    tokens=290_000_000,
    test=100,
    batch=128,
    seq_len=2048,
    steps=100_000,
    per_call=20,
    peak=1e-4,
    evaluations=100,
    dtype="bfloat16",
  ),
}
