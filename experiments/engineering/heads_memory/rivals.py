"""Cheap ways to run the heads that the library does not ship."""

import jax
import jax.numpy as jnp
import optax

from mtp_jax.loss import cross_entropy


def one_random_head(heads, inputs, targets, scale, key):
  """One head's loss, drawn anew at every step, N-fold (Stern 2018).

  Equals the sum over heads in expectation, not in a step.
  """
  i = jax.random.randint(key, (), 0, len(scale))
  state = heads.run(heads.layer(i), inputs.z, inputs.ctx)
  hidden = heads.normalise(state)
  logits = cross_entropy.project(hidden, heads.unembed.astype(hidden.dtype))
  nll = cross_entropy.token_nll(logits, targets.tokens[i]).sum()
  return len(scale) * scale[i] * nll


def optax_checkpointed(heads, inputs, targets, scale, key):
  """All heads at once, their logits one after another under a checkpoint."""
  del key  # nothing is drawn

  @jax.checkpoint
  def head_nll(hidden, unembed, target):
    logits = cross_entropy.project(hidden, unembed.astype(hidden.dtype))
    nll = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(target, 0)
    )
    return jnp.where(target >= 0, nll, 0.0).sum()

  hidden = heads(inputs)
  nll = [
    head_nll(h, heads.unembed[...], target)
    for h, target in zip(hidden, targets.tokens, strict=True)
  ]
  return jnp.stack(nll) @ scale
