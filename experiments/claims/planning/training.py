"""Trains one model on star graphs, all of them new, and measures its paths.

The library's training step runs on batches that are drawn as it goes: graphs
never repeat, and accuracy is measured during training, for which `fit` has no
place.
"""

from collections.abc import Iterator

import jax
import numpy as np

from experiments.claims.planning import scales
from experiments.measure import sweep
from mtp_jax import sharding
from mtp_jax.tasks import star_graph
from mtp_jax.train import step as step_lib

_HELD_OUT = 10**6  # seed of the graphs that are measured on; no run has it
_SOLVED = 0.995  # share of whole paths at which training ends


def figures(
  scale: scales.Scale, graph: star_graph.Shape, n: int, seed: int
) -> Iterator[sweep.Figure]:
  """Trains, and measures every `scale.every` steps.

  Training ends early when two measurements in a row find nearly all paths
  right.

  Yields:
    At each measurement: `first` and `path`, shares of held-out graphs as
    `star_graph.accuracy` defines them, and `nats`, head 1's training loss.
  """
  cfg = scale.config(graph, n, seed)
  mesh = sharding.make_mesh(cfg.mesh, jax.local_devices()[:1])
  state = step_lib.init_state(cfg, mesh)
  train = step_lib.compile_step(cfg, mesh)
  held = star_graph.draw(graph, scale.held, np.random.default_rng(_HELD_OUT))
  rng, solved = np.random.default_rng(seed), 0
  for step in range(1, scale.steps + 1):
    documents = star_graph.draw(graph, scale.batch, rng)
    batch = star_graph.batch(documents, graph, n)
    state, metrics = train(state, batch)
    if step % scale.every and step != scale.steps:
      continue
    found = star_graph.accuracy(state.model, held, graph)
    found["nats"] = float(metrics["nats"][0])
    print(f"step {step}: {found}", flush=True)
    for metric, value in found.items():
      yield sweep.Figure(step, metric, value)
    solved = solved + 1 if found["path"] >= _SOLVED else 0
    if solved == 2:
      return
