"""Eight-bit integers with a float32 scale: weights of drafts, and caches."""

import dataclasses

import jax
import jax.numpy as jnp


def quantise(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """Rounds x to 8-bit integers, so that x is about values * scale.

  Args:
    x: any shape.
    axis: along which all share a scale, the largest magnitude over 127.

  Returns:
    values int8 as x, scale float32 with `axis` of size 1.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis, keepdims=True) / 127
  return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
  """A weight [D, ...] with a scale [1, ...], one for each vector of axis 0.

  It can replace an array, since layers cast weights with `astype`.
  """

  values: jax.Array
  scale: jax.Array

  @property
  def ndim(self) -> int:
    """Axes of the weight."""
    return self.values.ndim

  def astype(self, dtype) -> jax.Array:
    """The weight [D, ...] as an array of `dtype`, scales multiplied in."""
    return self.values.astype(dtype) * self.scale.astype(dtype)


def matrix(w: jax.Array) -> Matrix:
  """`w` [D, ...] of any float dtype, rounded."""
  return Matrix(*quantise(w, 0))
