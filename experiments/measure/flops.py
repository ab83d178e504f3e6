"""FLOPs of a function's matrix products, over all iterations of its loops.

XLA's own `cost_analysis` counts the body of a loop once. Here the body of a
scan counts once per iteration. Elementwise operations
are not counted: in a transformer they are a few percent.
"""

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(fun, *args) -> int:
  """Floating point operations of `fun(*args)`, on all devices together.

  Args:
    fun: a function of pytrees; jit, grad, checkpoint, vmap may be inside.
    args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

  Returns:
    The sum over matrix products [M, K] @ [K, N] of 2 M K N, of a scan length
    times that, of a conditional's dearest branch. Recomputation under
    `jax.checkpoint` is counted where it happens. A product that nothing uses is
    not counted: `jax.jit` drops it before it compiles.

  Raises:
    ValueError: a product in a loop of unknown length, or in an operation that
      is not known here.
  """
  jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(used)


def _count(jaxpr) -> int:
  return sum(_count_equation(eqn) for eqn in jaxpr.eqns)


def _count_equation(eqn) -> int:
  name = eqn.primitive.name
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    terms = math.prod(shape[axis] for axis in contracted)
    return 2 * terms * eqn.outvars[0].aval.size
  inner = [_count(jaxpr) for jaxpr in _jaxprs(eqn.params)]
  if name == "scan":
    return eqn.params["length"] * sum(inner)
  if name == "cond":
    return max(inner)
  known = name not in ("while", "shard_map") or not any(inner)
  if not known or name in ("conv_general_dilated", "ragged_dot_general"):
    raise ValueError(f"cannot count the FLOPs of {name!r}")
  return sum(inner)


def _jaxprs(params):
  """The jaxprs among an equation's parameters, lists of them included."""
  for leaf in jax.tree.leaves(
    list(params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)
  ):
    if isinstance(leaf, core.ClosedJaxpr):
      yield leaf.jaxpr
    elif isinstance(leaf, core.Jaxpr):
      yield leaf
