"""What trained heads say of the next token X and the one behind it, Y.

After a context c, the model's own distribution of both is
q(x, y | c) = q_1(x | c) q_1(y | c, x), head 1 at c and at the token after it.
Its marginal q(y | c) = sum_x q(x, y | c) takes a pass for every x that could
follow, V of them: dear, but exact. Head 2 learns to approximate this marginal
in one pass. Text gives one pair (x, y) for each context, so every figure is an
average over contexts of a logarithm at the pair that follows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.model import model


@functools.partial(jax.jit, static_argnames="rows")
def log_probabilities(
  net: model.Model, windows: jax.Array, rows: int
) -> dict[str, jax.Array]:
  """Log-probabilities, in nats, of what follows each context.

  Args:
    net: a model of two heads or more.
    windows: [R, S+2] int32: contexts of S tokens, then x and y. R is a
      multiple of `rows`.
    rows: contexts whose V continuations are computed at once.

  Returns:
    float32 [R] each: `x`, log q(x | c); `y_after_x`, log q(y | c, x); `y`, log
    q(y | c), the exact marginal; `head_2`, what head 2 says of y at c.
  """
  V = net.cfg.vocab

  def some(windows):  # [rows, S+2]
    contexts, x, y = windows[:, :-2], windows[:, -2], windows[:, -1]
    of_x, of_y = _log_p(net, contexts, (0, 1))
    longer = jnp.repeat(contexts, V, 0)
    each = jnp.tile(jnp.arange(V), len(windows))[:, None]
    (after,) = _log_p(net, jnp.concatenate([longer, each], 1), (0,))
    after = jnp.take_along_axis(
      after.reshape(-1, V, V), y[:, None, None], 2
    )  # [rows, V, 1]: of y, after every token that could be x
    joint = of_x + after[..., 0]

    def at(table, index):
      return jnp.take_along_axis(table, index[:, None], 1)[:, 0]

    return {
      "x": at(of_x, x),
      "y_after_x": at(after[..., 0], x),
      "y": jax.nn.logsumexp(joint, 1),
      "head_2": at(of_y, y),
    }

  groups = windows.reshape(-1, rows, windows.shape[1])
  return jax.tree.map(jnp.ravel, jax.lax.map(some, groups))


def _log_p(net, tokens, heads):
  """Log-probabilities [B, V] of some heads (from 0) behind tokens [B, S]."""
  inputs = net.read(tokens, jnp.ones_like(tokens), tokens.shape[1])
  found = []
  for i in heads:
    hidden = net.heads.normalise(
      net.heads.run(net.heads.layer(i), inputs.z, inputs.ctx)
    )
    logits = hidden[:, -1] @ net.heads.unembed[...].astype(hidden.dtype)
    found.append(jax.nn.log_softmax(logits.astype(jnp.float32)))
  return found


def figures(found: dict[str, np.ndarray]) -> dict[str, float]:
  """Averages over contexts, in bits.

  Args:
    found: from `log_probabilities`.

  Returns:
    Cross-entropies `H(X)`, `H(Y)`, `H(X|Y)` and `H(Y|X)` of text under the
    model's q; `I`, their relative mutual information; `head 2`, the loss of
    head 2; `I from heads`, the loss of head 2 minus that of head 1 at the same
    token, which is I and head 2's distance from the exact marginal together.
  """
  f = {k: np.asarray(v, np.float64) / np.log(2) for k, v in found.items()}
  shared = f["y_after_x"] - f["y"]
  return {
    "H(X)": -f["x"].mean(),
    "H(Y)": -f["y"].mean(),
    "H(X|Y)": -(f["x"] + shared).mean(),
    "H(Y|X)": -f["y_after_x"].mean(),
    "I": shared.mean(),
    "head 2": -f["head_2"].mean(),
    "I from heads": (f["y_after_x"] - f["head_2"]).mean(),
    "I standard error": shared.std() / np.sqrt(len(shared)),
  }


def by_place(found: dict[str, np.ndarray], windows: np.ndarray) -> dict:
  """I in bits where x begins a word, goes on with one, or is anything else.

  Returns:
    Kind of place -> (share of the contexts, mean I there).
  """
  before, x = windows[:, -3], windows[:, -2]
  letter, letter_before = _is_letter(x), _is_letter(before)
  shared = np.asarray(found["y_after_x"] - found["y"], np.float64) / np.log(2)
  places = {
    "a word begins": letter & ~letter_before,
    "a word goes on": letter & letter_before,
    "other": ~letter,
  }
  return {
    name: (float(here.mean()), float(shared[here].mean()))
    for name, here in places.items()
    if here.any()
  }


def _is_letter(ids):
  ids = np.asarray(ids)
  upper, lower = ids - ord("A"), ids - ord("a")
  return ((upper >= 0) & (upper < 26)) | ((lower >= 0) & (lower < 26))
