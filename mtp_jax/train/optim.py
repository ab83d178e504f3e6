"""The optimiser, AdamW or Muon, and the schedule of the learning rate."""

import jax
import optax
from flax import nnx

from mtp_jax import config


def schedule(cfg: config.Optim, steps: int) -> optax.Schedule:
  """Linear warm-up to `cfg.peak`, then a decay to `cfg.end * cfg.peak`.

  The decay is half a cosine, or a line (`cfg.schedule`).

  The argument of the schedule is the number of updates so far, which excludes
  steps with a non-finite gradient. A run that resumes with more steps or other
  rates follows the new schedule from that number on. If it had finished, a
  longer schedule therefore raises the rate again.

  Args:
    cfg: `peak`, `schedule`, `end` and `warmup` are used.
    steps: updates until the end of the decay.

  Reference: the paper, table S13 and its caption, for the cosine.

  Example:
    >>> from mtp_jax import config
    >>> from mtp_jax.train import optim
    >>> rate = optim.schedule(config.Optim(peak=1e-3, warmup=10, end=0.1), 100)
    >>> [f"{rate(step):.5f}" for step in (0, 5, 10, 55, 100)]
    ['0.00000', '0.00050', '0.00100', '0.00055', '0.00010']
  """
  if cfg.schedule == "linear":
    up = optax.linear_schedule(0.0, cfg.peak, cfg.warmup)
    down = optax.linear_schedule(
      cfg.peak, cfg.peak * cfg.end, steps - cfg.warmup
    )
    return optax.join_schedules((up, down), (cfg.warmup,))
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=cfg.peak,
    warmup_steps=cfg.warmup,
    decay_steps=steps,
    end_value=cfg.peak * cfg.end,
  )


def decayed(tree):
  """The mask of weight decay: True for matrices, False for norm scales."""
  return jax.tree.map(
    lambda p: p.replace(len(p.axes) > 1),
    tree,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )


def make(cfg: config.Optim, steps: int) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW or Muon.

  With `cfg.kind` 'muon', Muon updates the matrices of the transformer layers
  and of linear heads. Its updates are scaled to the root mean square of AdamW
  updates, so that both can use one learning rate. Adam with Nesterov momentum
  and without weight decay updates the embedding, the unembedding and the norms,
  at `cfg.adam_ratio` times that rate.

  Args:
    cfg: the section of the config.
    steps: updates until the end of the schedule.

  Returns:
    A transformation; its moments have the shapes of the model's parameters.

  Reference: the paper, table S13 and its caption, for AdamW; Liu et al. 2025
  (arXiv 2502.16982) for Muon beside Adam.
  """
  rate = schedule(cfg, steps)
  if cfg.kind == "muon":
    update = optax.contrib.muon(
      rate,
      ns_steps=cfg.newton_schulz,
      weight_decay=cfg.decay,
      weight_decay_mask=decayed,
      adam_b1=cfg.beta1,
      adam_b2=cfg.beta2,
      muon_weight_dimension_numbers=_orthogonalised,
      consistent_rms=0.2,  # of an AdamW update, as Liu et al. measured
      adam_learning_rate=lambda step: cfg.adam_ratio * rate(step),
    )
  else:
    update = optax.adamw(
      rate,
      b1=cfg.beta1,
      b2=cfg.beta2,
      weight_decay=cfg.decay,
      mask=decayed,
    )
  return optax.chain(optax.clip_by_global_norm(cfg.clip), update)


def _orthogonalised(tree):
  """The input and output axes of each matrix that Muon updates.

  The three axes of an attention parameter form one matrix, [D, H C] or
  [H C, D]. A stack has one matrix per layer. Parameters that Adam updates get
  None.
  """

  def one(p):
    if len(p.axes) < 2 or "vocab" in p.axes or not jax.tree.leaves(p):
      return p.replace(None)
    last = p.get_value().ndim
    *axes, final = range(last - len(p.axes), last)
    if p.axes[0] == "embed":
      first, *rest = *axes, final
      return p.replace(
        optax.contrib.MuonDimensionNumbers((first,), tuple(rest))
      )
    return p.replace(optax.contrib.MuonDimensionNumbers(tuple(axes), (final,)))

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
