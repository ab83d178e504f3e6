"""From logits to the distribution that a token is drawn from."""

import dataclasses

import jax
import jax.numpy as jnp


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
  """

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  penalty: float | None = None

  def check(self) -> None:
    """Raises ValueError that names the number and its bounds."""
    bounds = {
      "temperature": (lambda x: x > 0, "above 0 (for 0 use accept.Greedy)"),
      "top_k": (lambda x: x >= 1, "at least 1"),
      "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1"),
      "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
      "penalty": (lambda x: x > 0, "above 0"),
    }
    for name, (good, words) in bounds.items():
      value = getattr(self, name)
      if value is not None and not good(value):
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
    if self.penalty is not None:
      low = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
      logits = jnp.where(seen, low, logits)
    if self.temperature is not None:
      logits = logits / self.temperature
    # One sort serves top-k and top-p: both keep what reaches a threshold.
    least = jnp.full_like(logits[..., :1], -jnp.inf)
    if self.top_k is not None or self.top_p is not None:
      ranked = -jnp.sort(-logits, -1)
      if self.top_k is not None:
        last = jnp.clip(jnp.asarray(self.top_k) - 1, 0, logits.shape[-1] - 1)
        least = jnp.take(ranked, last, axis=-1)[..., None]
      if self.top_p is not None:
        kept = jax.nn.softmax(jnp.where(ranked >= least, ranked, -jnp.inf))
        before = jnp.cumsum(kept, -1) - kept
        inside = (before < self.top_p) & (ranked >= least)
        least = jnp.where(inside, ranked, jnp.inf).min(-1, keepdims=True)
    if self.min_p is not None:
      best = logits.max(-1, keepdims=True)
      least = jnp.maximum(least, best + jnp.log(self.min_p))
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
    noise = jax.random.gumbel(key, probabilities.shape)
    return best(jnp.log(probabilities) + noise, count)

  return jax.vmap(row)(probabilities, keys)


def best(logits: jax.Array, count: int) -> jax.Array:
  """The `count` best tokens of logits [..., V], best first, int32."""
  if count == 1:  # a sort otherwise
    return logits.argmax(-1, keepdims=True).astype(jnp.int32)
  return jax.lax.top_k(logits, count)[1].astype(jnp.int32)
