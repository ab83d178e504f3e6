"""From logits to the distribution that a token is drawn from."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode import checks

# Beyond these a float32 logit may become infinite, or a number 0.
_LEAST, _MOST = 1e-6, 1e6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
  """Filters of a distribution, applied in this order; None leaves one out.

  The numbers are arrays to jit: changing one compiles nothing, switching a
  filter on or off does.

  Attributes:
    penalty: logits of tokens that the text already holds are divided by it
      where positive, multiplied where negative (repetition penalty).
    temperature: logits are divided by it.
    top_k: keeps the k likeliest tokens, and those tied with the last.
    top_p: keeps the likeliest tokens up to this share of the probability, the
      one that crosses it included.
    min_p: keeps tokens at least this share as likely as the likeliest.

  Example:
    >>> from mtp_jax.decode import sampling
    >>> sampling.Sampler(temperature=0.8, top_p=0.95).check()
    >>> sampling.Sampler(top_p=2).check()
    Traceback (most recent call last):
    ...
    ValueError: top_p=2 ...
  """

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  penalty: float | None = None

  def check(self) -> None:
    """Raises ValueError that names the number and its bounds."""
    between = f"from {_LEAST:g} to {_MOST:g}"
    bounds = {
      "temperature": (
        lambda x: _LEAST <= x <= _MOST,
        f"{between} (0 is greedy decoding: accept.GREEDY)",
      ),
      "top_k": (lambda x: 1 <= x < 2**31, "at least 1, and below 2**31"),
      "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1"),
      "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
      "penalty": (lambda x: _LEAST <= x <= _MOST, between),
    }
    for name, (good, words) in bounds.items():
      value = getattr(self, name)
      if value is None:
        continue
      read = checks.integer if name == "top_k" else checks.number
      if not good(read(name, value)):
        raise ValueError(f"{name}={value} has to be {words}")

  def probabilities(
    self, logits: jax.Array, seen: jax.Array | None = None
  ) -> jax.Array:
    """Float32 probabilities [..., V] of logits [..., V].

    Args:
      logits: any float dtype; -inf is never drawn.
      seen: [..., V] bool, tokens of the text so far; only for `penalty`.
    """
    logits = logits.astype(jnp.float32)
    temperature, top_p, min_p, penalty = (
      None if x is None else jnp.asarray(x, jnp.float32)
      for x in (self.temperature, self.top_p, self.min_p, self.penalty)
    )
    if penalty is not None:
      low = jnp.where(logits > 0, logits / penalty, logits * penalty)
      logits = jnp.where(seen, low, logits)
    if temperature is not None:
      logits = logits / temperature
    # One sort serves top-k and top-p: both keep what reaches a threshold.
    least = jnp.full_like(logits[..., :1], -jnp.inf)
    if self.top_k is not None or top_p is not None:
      ranked = -jnp.sort(-logits, -1)
      if self.top_k is not None:
        last = jnp.clip(jnp.asarray(self.top_k) - 1, 0, logits.shape[-1] - 1)
        least = jnp.take(ranked, last, axis=-1)[..., None]
      if top_p is not None:
        kept = jax.nn.softmax(jnp.where(ranked >= least, ranked, -jnp.inf))
        before = jnp.cumsum(kept, -1) - kept
        inside = (before < top_p) & (ranked >= least)
        least = jnp.where(inside, ranked, jnp.inf).min(-1, keepdims=True)
        # A share too small for a float32 still keeps the likeliest.
        least = jnp.minimum(least, ranked[..., :1])
    if min_p is not None:
      best = logits.max(-1, keepdims=True)
      least = jnp.maximum(least, best + jnp.log(min_p))
    return jax.nn.softmax(jnp.where(logits >= least, logits, -jnp.inf))


def draw(probabilities: jax.Array, keys: jax.Array) -> jax.Array:
  """One token [B] int32 from each row of probabilities [B, V], by keys [B]."""
  return jax.vmap(jax.random.categorical)(keys, jnp.log(probabilities)).astype(
    jnp.int32
  )


def draw_distinct(
  probabilities: jax.Array, count: int, keys: jax.Array
) -> jax.Array:
  """Tokens [B, D, count] int32 drawn one after another without replacement.

  Equals drawing from [B, D, V], removing what was drawn, renormalising and
  drawing again; here by ranking Gumbel-perturbed logarithms. Where fewer than
  `count` tokens have a chance, the rest are tokens that have none.
  """

  def row(probabilities, key):
    noise = jax.random.gumbel(key, probabilities.shape, probabilities.dtype)
    return best(jnp.log(probabilities) + noise, count)

  return jax.vmap(row)(probabilities, keys)


def best(logits: jax.Array, count: int) -> jax.Array:
  """The `count` best tokens of logits [..., V], best first, int32."""
  if count == 1:  # a sort otherwise
    return logits.argmax(-1, keepdims=True).astype(jnp.int32)
  return jax.lax.top_k(logits, count)[1].astype(jnp.int32)
