"""FLOPs counted by hand, and against XLA where XLA counts right."""

import jax
import jax.numpy as jnp
import pytest

from experiments.measure import flops

A = jax.ShapeDtypeStruct((5, 7), "float32")
B = jax.ShapeDtypeStruct((7, 11), "float32")
SQUARE = jax.ShapeDtypeStruct((7, 7), "float32")
ONE = 2 * 5 * 7 * 11  # A @ B


def turns(body, length):
  return lambda x, w: jax.lax.scan(
    lambda x, _: (body(x, w), None), x, length=length
  )[0]


def test_one_product_and_a_batch_of_them():
  assert flops.count(jnp.matmul, A, B) == ONE
  stack = jax.ShapeDtypeStruct((3, 5, 7), "float32")
  assert flops.count(jax.vmap(jnp.matmul, (0, None)), stack, B) == 3 * ONE
  assert flops.count(lambda a, b: (a @ b).sum() + a.sum(), A, B) == ONE


def test_gradient_is_three_products():
  def loss(a, b):
    return (a @ b).sum()

  grads = jax.value_and_grad(loss, argnums=(0, 1))
  assert flops.count(jax.jit(grads), A, B) == 3 * ONE
  # under a checkpoint the product is not run again: nothing needs its result
  grads = jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1))
  assert flops.count(grads, A, B) == 3 * ONE


def test_loops_count_every_turn():
  step = 2 * 5 * 7 * 7
  assert flops.count(turns(jnp.matmul, 13), A, SQUARE) == 13 * step
  nested = turns(turns(jnp.matmul, 3), 13)
  assert flops.count(nested, A, SQUARE) == 39 * step
  once = jax.jit(nested).lower(A, SQUARE).compile().cost_analysis()["flops"]
  assert once < 2 * step  # why this module exists


def test_recomputation_counts():
  def layer(x, w):
    return jnp.sin(jnp.sin(x @ w) @ w)

  def grad(f):
    return jax.grad(lambda x, w: turns(f, 3)(x, w).sum(), argnums=(0, 1))

  step = 2 * 5 * 7 * 7
  assert flops.count(grad(layer), A, SQUARE) == 3 * 3 * 2 * step
  assert flops.count(grad(jax.checkpoint(layer)), A, SQUARE) == 3 * 4 * 2 * step


def test_agrees_with_xla_without_loops():
  def loss(a, b):
    return jnp.sin(a @ b).sum()

  grads = jax.grad(loss, argnums=(0, 1))
  big = [jax.ShapeDtypeStruct(s, "float32") for s in ((128, 512), (512, 256))]
  xla = jax.jit(grads).lower(*big).compile().cost_analysis()["flops"]
  # elementwise work, which only XLA counts, is under 1 % at this width
  assert flops.count(grads, *big) == pytest.approx(xla, rel=0.01)


def test_a_branch_counts_as_its_dearest():
  def either(a, b):
    return jax.lax.cond(
      a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((5, 11)) + a[0, 0]
    )

  assert flops.count(either, A, B) == ONE


def test_unknown_trip_count_is_an_error():
  def loop(a, w):
    return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, a)

  with pytest.raises(ValueError, match="while"):
    flops.count(loop, A, SQUARE)
  assert (
    flops.count(
      lambda a, b: (
        jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, 0) + a @ b
      ),
      A,
      B,
    )
    == ONE
  )
