"""Byte models by their number of heads, and their runs at each scale."""

from configs.paper import bytes_7b
from experiments.claims import byte_sweeps
from experiments.measure import python_models, sweep

HEADS = {"test": (1, 2), "cpu": (1, 8, 16, 32), "gpu": (1, 8, 16, 32)}
PAPER = {f"n={n}": f"7B-n{n}" for n in (1, 8, 16, 32)}  # table 1
SEEDS = {"test": (0,), "cpu": (0, 1), "gpu": (0, 1)}
LAYERS = {"test": 1, "cpu": 3, "gpu": 8}
DECODED = (2, 4, 8, 12, 16, 20, 24, 28, 32)  # k of table S3


def runs(scale: str) -> list[sweep.Run]:
  """The runs of a scale: each head has its own unembedding on a whole trunk."""
  if scale == "paper":
    return byte_sweeps.paper_runs("byte_level", bytes_7b, PAPER, DECODED)
  return [
    python_models.run(
      "byte_level",
      f"n={n}",
      scale,
      {
        "model": {"n_future": n, "head": "unembedding", "layers": LAYERS[scale]}
      },
      seed=seed,
      heads=tuple(k for k in DECODED if k <= n),
    )
    for seed in SEEDS[scale]
    for n in HEADS[scale]
  ]
