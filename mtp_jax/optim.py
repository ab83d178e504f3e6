"""AdamW as in the paper's appendix: schedule, decay mask, clipping."""

import jax
import optax
from flax import nnx

from mtp_jax import config


def schedule(cfg: config.Optim, steps: int) -> optax.Schedule:
  """Linear warm-up to `cfg.peak`, cosine to `cfg.end * cfg.peak` at `steps`.

  A function of the updates made so far: steps with a finite gradient. So a run
  that goes on with more steps, or other rates, takes from its next step on
  the rate that the new schedule has there. Where it had come to the end of
  its cosine, a longer one raises the rate again.

  Reference: the paper, table S13 and its caption.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=cfg.peak,
    warmup_steps=cfg.warmup,
    decay_steps=steps,
    end_value=cfg.peak * cfg.end,
  )


def decayed(tree):
  """True for matrices, false for norm scales, whatever stack they are in."""
  return jax.tree.map(
    lambda p: p.replace(len(p.axes) > 1),
    tree,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )


def make(cfg: config.Optim, steps: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW; moments are shaped like the model.

  Args:
    cfg: rates, betas, decay and clip.
    steps: updates until the schedule's end.

  Returns:
    A transformation whose updates `optax.apply_updates` adds.

  Reference: the paper, table S13 and its caption.
  """
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip),
    optax.adamw(
      schedule(cfg, steps),
      b1=cfg.beta1,
      b2=cfg.beta2,
      weight_decay=cfg.decay,
      mask=decayed,
    ),
  )
