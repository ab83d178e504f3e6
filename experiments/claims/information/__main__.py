"""How much the next two tokens tell of each other, in tables and in models.

  python -m experiments.claims.information --scale=cpu \\
    --output=runs/information

Checks the identities of the paper's appendix L.2 on random tables. Then trains
small byte models, and estimates the terms of their two-token loss on held-out
files. Finished runs are not repeated.
"""

import functools

import numpy as np

import mtp_jax
from experiments.claims.information import predictions, report, scales, tables
from experiments.measure import python_models, sweep
from experiments.startup import options, program
from mtp_jax.data import pipeline

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MINUTES = options.define_minutes()


def main(_: list[str]) -> None:
  """Measures what is not measured yet, and prints the tables."""
  scale, folder = scales.SCALES[_SCALE.value], _OUTPUT.value
  runs = [
    sweep.Run(
      "information",
      "random tables",
      {"tables": scale.tables},
      0,
      lambda _: check_tables(scale.tables),
    )
  ]
  for seed in range(scale.seeds):
    runs += [train(scale, n, seed) for n in scale.heads]
  sweep.run_and_show(runs, folder, _MINUTES.value, report.section)


def check_tables(count: int):
  """Yields the largest residual of each identity, in nats."""
  rng, largest = np.random.default_rng(0), {}
  for shape in ((2, 2), (7, 5), (64, 64)):
    for zeros in (0.0, 0.5):
      for _ in range(count):
        p = tables.random_table(rng, *shape, zeros=zeros)
        q = tables.random_table(rng, *shape)
        for name, value in tables.residuals(p, q).items():
          largest[name] = max(abs(value), largest.get(name, 0.0))
  for name, value in largest.items():
    yield sweep.Figure(0, f"largest residual: {name}", value)


def train(scale: scales.Scale, n: int, seed: int) -> sweep.Run:
  """The run that trains a model of n heads and measures it."""
  changes = {
    "model": {"n_future": n, "layers": 2 + n},
    "train": {"steps": scale.steps},
  }
  run = python_models.run(
    "information", f"n={n}", scale.size, changes, seed=seed
  )

  def measure(folder):
    yield from run.measure(folder)
    net, cfg, codec = mtp_jax.load(folder)
    _, held = pipeline.pack(cfg.data, codec)
    size = scale.length + 2
    windows = np.stack(held.excerpts(scale.contexts, size, size))
    windows = windows.astype(np.int32)
    found = predictions.log_probabilities(net, windows, scale.rows)
    found = {name: np.asarray(values) for name, values in found.items()}
    figure = functools.partial(sweep.Figure, scale.steps)
    for name, value in predictions.figures(found).items():
      yield figure(name, value)
    for name, (share, value) in predictions.by_place(found, windows).items():
      yield figure(f"share where {name}", share)
      yield figure(f"I where {name}", value)

  return sweep.Run(run.claim, run.name, run.overrides, seed, measure)


if __name__ == "__main__":
  program.start(main)
