"""The rows of the paper's table S4, and their runs at each scale."""

from configs.paper import code_7b
from experiments.claims import byte_sweeps
from experiments.measure import python_models, sweep

SEEDS = {"test": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
LAYERS = {"test": 5, "cpu": 6, "gpu": 12}  # L, heads included
STEPS = {"test": 4, "cpu": 1500, "gpu": 1500}
ROWS = {
  "n=1": {"n_future": 1},
  "linear": {"head": "linear"},
  "anticausal": {"head": "anticausal"},
  "causal": {"head": "causal"},
  "parallel": {},
  "parallel, 3 layers more": {"extra_layers": 3},
}
PAPER = {
  "n=1": "200B-n1",
  "linear": "200B-n4-linear",
  "anticausal": "200B-n4-anticausal",
  "causal": "200B-n4-causal",
  "parallel": "200B-n4",
  "parallel, 3 layers more": "200B-n4-plus3",
}


def runs(scale: str) -> list[sweep.Run]:
  """The runs of a scale; n=4 unless said."""
  if scale == "paper":
    return byte_sweeps.paper_runs("head_kinds", code_7b, PAPER)
  shape = {"n_future": 4, "layers": LAYERS[scale]}
  train = {"steps": STEPS[scale]}
  return [
    python_models.run(
      "head_kinds",
      name,
      scale,
      {"model": shape | row, "train": train},
      seed=seed,
    )
    for seed in SEEDS[scale]
    for name, row in ROWS.items()
  ]
