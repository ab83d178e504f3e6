"""How many problems are answered, and how often, at each scale."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the experiment."""

  problems: int  # answered greedily, in equal steps through the file
  max_new: int  # tokens of an answer, at most
  rows: int  # answers at once
  temperatures: tuple[float, ...]
  samples: int  # n, of each problem at each temperature
  sampled: int  # problems that are sampled
  ks: tuple[int, ...]
  compared: int  # problems that are answered greedily in three ways
  compared_new: int  # tokens of these answers, at most
  nodes: int  # of the tree of drafts
  tuned: int  # problems whose answers build the tree


SCALES = {
  "test": Scale(2, 24, 2, (0.4, 0.8), 3, 2, (1, 3), 2, 24, 4, 1),
  "cpu": Scale(41, 256, 16, (0.2, 0.8), 10, 6, (1, 10), 8, 48, 8, 4),
  "gpu": Scale(164, 512, 164, (0.2, 0.8), 50, 164, (1, 10), 164, 512, 16, 8),
  # Table 1: 200 samples, the temperatures of table S12.
  "paper": Scale(
    164, 512, 164, (0.1, 0.2, 0.4, 0.8), 200, 164, (1, 10, 100), 164, 512, 16, 8
  ),
}
