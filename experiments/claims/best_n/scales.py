"""Numbers of heads at equal total layers, and their runs at each scale."""

from configs.paper import code_7b
from experiments.claims import byte_sweeps
from experiments.measure import python_models, sweep

HEADS = {"test": (1, 2), "cpu": (1, 2, 4, 6), "gpu": (1, 2, 4, 6, 8)}
SEEDS = {"test": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
LAYERS = {"test": 3, "cpu": 7, "gpu": 12}  # L, heads included
STEPS = {"test": 4, "cpu": 1500, "gpu": 1500}
PAPER = {f"n={n}": f"200B-n{n}" for n in (1, 2, 4, 6, 8)}  # table 1


def runs(scale: str) -> list[sweep.Run]:
  """The runs of a scale: n parallel heads leave L - n layers to the trunk."""
  if scale == "paper":
    return byte_sweeps.paper_runs("best_n", code_7b, PAPER)
  return [
    python_models.run(
      "best_n",
      f"n={n}",
      scale,
      {
        "model": {"n_future": n, "layers": LAYERS[scale]},
        "train": {"steps": STEPS[scale]},
      },
      seed=seed,
    )
    for seed in SEEDS[scale]
    for n in HEADS[scale]
  ]
