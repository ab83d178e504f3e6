"""Frequencies of rotary embeddings, and how they are scaled to long contexts.

Channel pair j of C/2 turns by frequency(j) per position. A pair's turns are how
often it turns within the context that the model was trained on,
`cfg.rope_length` tokens. With s = `cfg.rope_factor`:

  none     frequency(j) = theta ** (-2 j / C)
  linear   all frequencies over s
  llama3   those of fewer turns than `rope_slow` over s, those of more turns
           than `rope_fast` as they are, in between both mixed by their turns
  yarn     the same bounds, mixed by the number j of the pair; cos and sin are
           multiplied by `rope_attention`
  dynamic  theta grows with the text beyond `rope_length`

References: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071), whose section
3 has linear, dynamic ("NTK-aware") and its own; llama3 is Llama 3.1's.
"""

import math

import jax
import jax.numpy as jnp

from mtp_jax import config


def frequencies(
  cfg: config.Model, length: jax.Array | int | None = None
) -> jax.Array:
  """Radians per position of each channel pair.

  Args:
    cfg: the model's settings.
    length: tokens of the text, for dynamic scaling only: one number, or int32
      [...]. None counts as `cfg.rope_length`.

  Returns:
    float32 [C/2]; [..., C/2] where dynamic scaling takes lengths [...].
  """
  C = cfg.channels
  theta, factor = cfg.rope_theta, cfg.rope_factor
  if cfg.rope_scaling == "dynamic" and length is not None:
    ratio = jnp.maximum(length, cfg.rope_length) / cfg.rope_length
    theta *= (factor * ratio - (factor - 1)) ** (C / (C - 2))
    theta = theta[..., None] if theta.ndim else theta
  frequency = theta ** (-jnp.arange(0, C, 2, dtype=jnp.float32) / C)
  if cfg.rope_scaling == "linear":
    return frequency / factor
  if cfg.rope_scaling == "llama3":
    turns = frequency * (cfg.rope_length / (2 * math.pi))
    kept = (turns - cfg.rope_slow) / (cfg.rope_fast - cfg.rope_slow)
  elif cfg.rope_scaling == "yarn":
    first, last = _bounds(cfg)
    kept = (last - jnp.arange(C // 2)) / (last - first)
  else:
    return frequency
  kept = jnp.clip(kept, 0, 1)
  return frequency * kept + frequency / factor * (1 - kept)


def attention_factor(cfg: config.Model) -> float:
  """What cos and sin are multiplied by: not 1 with yarn only."""
  if cfg.rope_scaling != "yarn":
    return 1.0
  return cfg.rope_attention or 1 + 0.1 * math.log(cfg.rope_factor)


def _bounds(cfg: config.Model) -> tuple[float, float]:
  """Yarn's pairs between which frequencies are mixed, in whole pairs."""

  def pair(turns):
    ratio = cfg.rope_length / (turns * 2 * math.pi)
    return cfg.channels * math.log(ratio) / (2 * math.log(cfg.rope_theta))

  first = max(math.floor(pair(cfg.rope_fast)), 0)
  last = min(math.ceil(pair(cfg.rope_slow)), cfg.channels - 1)
  return first, last if last != first else first + 0.001
