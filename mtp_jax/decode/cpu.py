"""Products of a few rows with a large matrix, as a CPU computes them fastest.

XLA's CPU kernels copy the right-hand matrix of every product into tiles. In
`x @ w` that is the weight, in `q @ k.T` the keys, and the copy costs more than
the product with a few rows. With the large matrix on the left, the rows are
copied instead. Weights are therefore stored as [out, in].

In bfloat16 these kernels multiply two rows or more and write float32. For one
row, or a result in bfloat16, XLA first converts the weight to float32, which
takes ten times as long (jax 0.10.2, on an Intel Xeon with AMX). Gathers from a
bfloat16 array and scatters into it convert the whole array: see `row_dtype`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Elements from which on a float32 weight is turned. A smaller one lies in a
# core's cache, where its copy is cheap: 256 x 704 gained nothing and 96 x 256
# lost a tenth of a pass, where 576 x 1536 gained half of one.
LARGE = 1 << 18
FEW = 128  # rows of the other matrix from which on the copy costs little


def smallest(dtype: str) -> int:
  """Elements from which on a weight is kept as a `Matrix`.

  Args:
    dtype: of the activations that it is multiplied with.
  """
  return 0 if dtype == "bfloat16" else LARGE


def row_dtype(dtype: str) -> str:
  """The dtype of an embedding and of a cache in a model of `dtype`.

  Single rows of them are read and written.
  """
  return "float32" if dtype == "bfloat16" else dtype


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
    rows, asked = len(x), dtype or x.dtype
    if x.dtype == jnp.bfloat16:  # see the module
      dtype = "float32"
      if rows == 1:
        x = jnp.concatenate([x, x])
    if rows < FEW:
      y = jnp.einsum("FD,MD->FM", self.values, x, preferred_element_type=dtype)
      y = _swapped(y)
    else:
      y = jnp.einsum("MD,FD->MF", x, self.values, preferred_element_type=dtype)
    return y[:rows].astype(asked).reshape(*batch, *self.outputs)


def matrix(w: jax.Array, axes: int = 1) -> Matrix:
  """`w` [*in, *out] laid out; the first `axes` of its axes are `in`."""
  inputs, outputs = w.shape[:axes], w.shape[axes:]
  return Matrix(w.reshape(math.prod(inputs), -1).T, inputs, outputs)


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Float32 products [B, K, Q, S] of queries with all keys of a cache.

  Args:
    q: [B, K, Q, C].
    k: [B, K, S, C] in q's dtype.
  """

  def queries_first(q, k):
    return jnp.einsum("BKQC,BKSC->BKQS", q, k, preferred_element_type="float32")

  def keys_first(q, k):
    y = jnp.einsum("BKSC,BKQC->BKSQ", k, q, preferred_element_type="float32")
    return _swapped(y)

  if q.shape[2] >= FEW:
    return queries_first(q, k)
  return jax.lax.platform_dependent(q, k, cpu=keys_first, default=queries_first)


def _swapped(product):
  """`product` with its last two axes swapped."""
  # Without the barrier the compiler would swap the operands back.
  return jnp.swapaxes(jax.lax.optimization_barrier(product), -2, -1)
