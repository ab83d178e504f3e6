"""One corpus read once and four times, and the runs at each scale."""

from configs.paper import code_7b
from experiments.claims import byte_sweeps
from experiments.measure import python_models, sweep

SEEDS = {"test": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
LAYERS = {"test": 5, "cpu": 6, "gpu": 12}
BYTES = {"test": 300_000, "cpu": 300_000, "gpu": 12_000_000}  # of the corpus
# Steps that read the nine tenths of it which are not held out about once.
ONCE = {"test": 2, "cpu": 500, "gpu": 330}
PAPER = {  # table 1
  f"n={n}, {epochs} epochs": f"{budget}-n{n}"
  for epochs, budget in ((0.8, "200B"), (4, "1T"))
  for n in (1, 4)
}


def runs(scale: str) -> list[sweep.Run]:
  """The runs of a scale."""
  if scale == "paper":
    return byte_sweeps.paper_runs("epochs", code_7b, PAPER)
  return [
    python_models.run(
      "epochs",
      f"n={n}, {epochs} epoch{'s' if epochs > 1 else ''}",
      scale,
      {
        "model": {"n_future": n, "layers": LAYERS[scale]},
        "data": {"max_bytes": BYTES[scale]},
        "train": {"steps": epochs * ONCE[scale]},
      },
      seed=seed,
    )
    for seed in SEEDS[scale]
    for epochs in (1, 4)
    for n in (1, 4)
  ]
