"""AdamW as in the paper's appendix, or Muon: schedule, decay mask, clipping."""

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

  Example:
    >>> from mtp_jax import config
    >>> from mtp_jax.train import optim
    >>> rate = optim.schedule(config.Optim(peak=1e-3, warmup=10, end=0.1), 100)
    >>> [f"{rate(step):.5f}" for step in (0, 5, 10, 55, 100)]
    ['0.00000', '0.00050', '0.00100', '0.00055', '0.00010']
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
  """Clip by global norm, then AdamW or Muon; moments are shaped like the model.

  With `cfg.kind` 'muon' the matrices of the transformer layers and of linear
  heads are updated by Muon, scaled to the root mean square of an AdamW update,
  so that one learning rate can serve both. The embedding, the unembedding and
  the norms are updated by Adam with Nesterov momentum, without weight decay,
  at `cfg.adam_ratio` times that rate.

  Args:
    cfg: kind, rates, betas, decay and clip.
    steps: updates until the schedule's end.

  Returns:
    A transformation whose updates `optax.apply_updates` adds.

  Reference: the paper, table S13 and its caption, for AdamW; Liu et al. 2025
  (arXiv 2502.16982) for Muon beside Adam.
  """
  rate = schedule(cfg, steps)
  if cfg.kind == "muon":
    update = optax.contrib.muon(
      rate,
      weight_decay=cfg.decay,
      weight_decay_mask=decayed,
      adam_b1=cfg.beta1,
      adam_b2=cfg.beta2,
      muon_weight_dimension_numbers=_orthogonalised,
      consistent_rms=0.2,  # of an AdamW update, as Liu et al. found it
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
  """Which axes of a parameter Muon takes as a matrix's input and output.

  Attention's three axes are one matrix, [D, H C] or [H C, D]; a stack holds a
  matrix per layer. None: a parameter that Adam updates.
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
