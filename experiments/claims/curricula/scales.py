"""The curricula that are compared, and their runs at each scale.

All have four heads, each with its own unembedding, over one trunk.
"""

from experiments.measure import python_models, sweep

SEEDS = {"test": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
STEPS = {"test": 4, "cpu": 400, "gpu": 1500}
_QUARTERS = (0.25, 0.5, 0.75)
_FORWARD = (1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1)
_REVERSE = (1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0)

CURRICULA: dict[str, python_models.Changes] = {
  "plain sum": {},
  "head 1 alone": {"train": {"head_weights": (1, 0, 0, 0)}},
  "halved from head to head": {
    "train": {"head_weights": (1, 0.5, 0.25, 0.125)}
  },
  "far heads fade evenly": {
    "train": {
      "head_weights": (1, 1, 1, 1, 1, 0, 0, 0),
      "head_stages": (1.0,),
      "head_change": "linear",
    }
  },
  # One head more, or one less, in each quarter (arXiv 2505.22757).
  "forward": {"train": {"head_weights": _FORWARD, "head_stages": _QUARTERS}},
  "reverse": {"train": {"head_weights": _REVERSE, "head_stages": _QUARTERS}},
  # DeepSeek-V3's weights: 0.3 for 10 of 14.8 trillion tokens, then 0.1.
  "0.3, then 0.1": {
    "train": {
      "head_weights": (1, 0.3, 0.3, 0.3, 1, 0.1, 0.1, 0.1),
      "head_stages": (0.68,),
    }
  },
  "leaps of two": {"model": {"offsets": (1, 3, 5, 7)}},
  "far heads held back": {"train": {"detach": 2}},
}


def runs(scale: str) -> list[sweep.Run]:
  """The runs of a scale, seed after seed."""
  shape = {
    "model": {"n_future": 4, "head": "unembedding", "layers": 3},
    "train": {"steps": STEPS[scale]},
  }
  return [
    python_models.run("curricula", name, scale, shape, changes, seed=seed)
    for seed in SEEDS[scale]
    for name, changes in CURRICULA.items()
  ]
