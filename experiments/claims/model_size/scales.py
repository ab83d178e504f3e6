"""Widths and numbers of heads, and their runs at each scale."""

from configs.paper import scaling
from experiments.claims import byte_sweeps
from experiments.measure import python_models, sweep

SEEDS = {"test": (0,), "cpu": (0, 1), "gpu": (0, 1)}
WIDTHS = {"test": (16,), "cpu": (48, 96), "gpu": (128, 256, 512, 1024)}
HEADS = {"test": (1, 2), "cpu": (1, 4), "gpu": (1, 2, 4)}
LAYERS = {"test": 3, "cpu": 6, "gpu": 12}  # L, heads included
STEPS = {"test": 4, "cpu": 1500, "gpu": 1500}
PAPER = {run.replace("-n", ", n="): run for run in scaling.RUNS}  # table S7


def runs(scale: str) -> list[sweep.Run]:
  """The runs of a scale, all of as many steps on the same data."""
  if scale == "paper":
    return byte_sweeps.paper_runs("model_size", scaling, PAPER)
  return [
    python_models.run(
      "model_size",
      f"width {width}, n={n}",
      scale,
      {
        "model": {
          "width": width,
          "mlp": 3 * width,
          "n_future": n,
          "layers": LAYERS[scale],
        },
        "train": {"steps": STEPS[scale]},
      },
      seed=seed,
    )
    for seed in SEEDS[scale]
    for width in WIDTHS[scale]
    for n in HEADS[scale]
  ]
