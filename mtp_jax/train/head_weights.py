"""The weights of heads in the loss, which may change during training."""

import jax
import jax.numpy as jnp

from mtp_jax import config


def at(cfg: config.Train, n_future: int, step: jax.Array) -> jax.Array:
  """Weights of the heads in a step; computed from it, so one program has all.

  Without stages they are `cfg.head_weights`, all 1 by default. With stages,
  `cfg.head_weights` has N entries for each, and stage j > 1 begins after the
  share `cfg.head_stages[j-2]` of `cfg.steps`. Between the beginnings of two
  stages, 'step' keeps the weights of the first, and 'linear' moves evenly from
  the one's to the other's. After the last beginning nothing changes.

  A run that is resumed with more steps follows its stages' new beginnings.

  Args:
    cfg: `head_weights`, `head_stages`, `head_change` and `steps` are used.
    n_future: N.
    step: [] int32, steps made so far.

  Returns:
    float32 [N].

  Example, heads that join one after another (a forward curriculum):
    >>> from mtp_jax import config
    >>> from mtp_jax.train import head_weights
    >>> cfg = config.Train(
    ...   steps=100, head_weights=(1, 0, 1, 1), head_stages=(0.5,)
    ... )
    >>> [head_weights.at(cfg, 2, step).tolist() for step in (49, 50)]
    [[1.0, 0.0], [1.0, 1.0]]
  """
  weights = jnp.array(cfg.head_weights or (1.0,) * n_future, jnp.float32)
  if not cfg.head_stages:
    return weights
  stages = weights.reshape(-1, n_future)
  begins = jnp.array([0, *(round(s * cfg.steps) for s in cfg.head_stages)])
  stage = (step >= begins[1:]).sum()
  if cfg.head_change == "step":
    return stages[stage]
  following = jnp.minimum(stage + 1, len(stages) - 1)
  length = jnp.maximum(begins[following] - begins[stage], 1)
  share = (step - begins[stage]) / length
  return stages[stage] + share * (stages[following] - stages[stage])
