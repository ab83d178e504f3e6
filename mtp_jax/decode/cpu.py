"""Weights stored as [out, in], which a CPU multiplies faster by few rows.

XLA's CPU kernels copy the right-hand matrix of every product into tiles. In
`x @ w` that is the weight, and the copy costs more than the product with a few
rows. With the weight on the left, the rows are copied instead.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Elements from which on a weight is turned. A smaller one lies in a core's
# cache, where its copy is cheap: 256 x 704 gained nothing and 96 x 256 lost a
# tenth of a pass, where 576 x 1536 gained half of one.
LARGE = 1 << 18
FEW = 128  # rows from which on the copy's cost is negligible


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
  """A weight [*in, *out], kept as [out, in]; `layers.product` multiplies it."""

  values: jax.Array  # [out, in]
  inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  def astype(self, dtype) -> "Matrix":
    """The same weight with its values in `dtype`, as `jax.Array.astype`."""
    return dataclasses.replace(self, values=self.values.astype(dtype))

  def array(self) -> jax.Array:
    """The weight [*in, *out]."""
    return self.values.T.reshape(*self.inputs, *self.outputs)

  def product(self, x: jax.Array, dtype: str | None = None) -> jax.Array:
    """x [..., *in] times the weight, [..., *out]; see `layers.product`."""
    batch = x.shape[: x.ndim - len(self.inputs)]
    x = x.reshape(math.prod(batch), -1)
    if len(x) < FEW:
      y = jnp.einsum("FD,MD->FM", self.values, x, preferred_element_type=dtype)
      # Without the barrier the compiler would swap the operands back.
      y = jax.lax.optimization_barrier(y).T
    else:
      y = jnp.einsum("MD,FD->MF", x, self.values, preferred_element_type=dtype)
    return y.reshape(*batch, *self.outputs)


def matrix(w: jax.Array, axes: int = 1) -> Matrix:
  """`w` [*in, *out] laid out; the first `axes` of its axes are `in`."""
  inputs, outputs = w.shape[:axes], w.shape[axes:]
  return Matrix(w.reshape(math.prod(inputs), -1).T, inputs, outputs)
