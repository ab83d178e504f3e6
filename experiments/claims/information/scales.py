"""How much is trained and measured at each scale."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the experiment."""

  size: str  # of `python_models.SIZES`
  heads: tuple[int, ...]  # models that are measured, by their heads
  steps: int  # of training
  seeds: int
  tables: int  # random pairs of tables for each size of them
  contexts: int  # held-out contexts; after each, every byte is tried
  length: int  # tokens of a context
  rows: int  # contexts whose continuations are computed at once


SCALES = {
  "test": Scale("test", (2,), 4, 1, 20, 8, 16, 4),
  "cpu": Scale("cpu", (2,), 2000, 2, 1000, 768, 32, 4),
  "gpu": Scale("gpu", (2, 4), 1500, 3, 1000, 16_384, 128, 64),
}
