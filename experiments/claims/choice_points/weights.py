"""What choice points and idle transitions weigh in loss and gradient."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.choice_points import scales
from experiments.measure import sweep
from mtp_jax import loss, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.model import model
from mtp_jax.tasks import choice_points
from mtp_jax.train import step as step_lib

_MEASURED = 10**6  # seed of the documents that are measured on


def figures(scale: scales.Scale, n: int, seed: int) -> Iterator[sweep.Figure]:
  """Trains a model of n heads, and measures weights after `scale.steps`.

  Yields:
    Of each kind, `choice` and `idle`: its loss in units of log K for each
    random token of that kind; and the ratios of choice to idle, `loss ratio`
    and `gradient ratio`. The latter is of norms of the trunk's gradient.
  """
  cfg, language = scale.config(n, seed), scale.language
  mesh = sharding.make_mesh(cfg.mesh, jax.local_devices()[:1])
  state = step_lib.init_state(cfg, mesh)
  train = step_lib.compile_step(cfg, mesh)
  rng = np.random.default_rng(seed)
  held = choice_points.draw(
    language, scale.measured, np.random.default_rng(_MEASURED)
  )
  for step in range(max(scale.steps) + 1):
    if step in scale.steps:
      for metric, value in weigh(state.model, held, language).items():
        yield sweep.Figure(step, metric, value)
    documents = choice_points.draw(language, scale.batch, rng)
    state, _ = train(state, batch_lib.of(documents))


def weigh(
  net: model.Model, documents: np.ndarray, language: choice_points.Language
) -> dict[str, float]:
  """Loss and gradient of the terms of each kind, in units of log K.

  Args:
    net: the model, of n heads.
    documents: [B, language.tokens] from `choice_points.draw`.
    language: of the documents.
  """
  n = net.cfg.n_future
  batch = batch_lib.of(documents)
  tokens, _ = loss.future_targets(batch, n)
  unit = len(documents) * language.counted * np.log(language.letters)
  found = {}
  for name, here in choice_points.terms(language, n).items():
    weight = np.broadcast_to(here[:, None], tokens.shape).astype(np.float32)
    targets = loss.Targets(tokens, jnp.asarray(weight))
    found[name], found[f"{name} gradient"] = map(
      float, _loss_and_gradient(net, batch, targets, 1 / unit)
    )
  found["loss ratio"] = found["choice"] / found["idle"]
  found["gradient ratio"] = found["choice gradient"] / found["idle gradient"]
  return found


@jax.jit
def _loss_and_gradient(net, batch, targets, scale):
  """The loss of some terms, and the norm of its gradient in the trunk."""

  def total(trunk):
    whole = net.replace(trunk=trunk)
    scales = jnp.full((net.cfg.n_future,), scale)
    return loss.token_loss(whole, batch, targets, scales)[0]

  value, gradient = jax.value_and_grad(total)(net.trunk)
  squares = [jnp.vdot(a, a) for a in jax.tree.leaves(gradient)]
  return value, jnp.sqrt(sum(squares))
