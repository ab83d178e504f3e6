"""What head 1 would write at chosen places of given texts."""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.loss import cross_entropy
from mtp_jax.model import attention, model


def first_choices(
  net: model.Model,
  tokens: np.ndarray,
  places: np.ndarray,
  *,
  kernel: attention.Kernel = attention.xla,
) -> jax.Array:
  """Head 1's most likely next token after each of some places.

  Equals `net(tokens)[0].argmax(-1)` at these places, whose logits alone are
  computed. Where all choices of a stretch are its tokens, greedy decoding
  writes this stretch, and otherwise another one.

  Args:
    net: the model; one program per shape.
    tokens: [B, T] int32, a document in each row, which may end earlier.
    places: [B, n], from 0 to T-1.
    kernel: of the attention, see `layers.training_context`.

  Returns:
    [B, n] int32.
  """
  ahead = (net.cfg.n_future - 1) * net.heads.kind.reads_tokens
  tokens = np.pad(tokens, ((0, 0), (0, ahead)))
  return _choose(net, tokens, places, kernel, tokens.shape[1] - ahead)


def _choices(net, tokens, places, kernel, length):
  segments = jnp.ones_like(tokens)
  inputs = net.read(tokens, segments, length, kernel)
  hidden = net.heads.first(inputs)[:, :length]
  hidden = jnp.take_along_axis(hidden, places[..., None], 1)
  unembed = net.heads.unembedding(0).astype(hidden.dtype)
  logits = cross_entropy.project(hidden, unembed)
  return logits.argmax(-1).astype(jnp.int32)


_choose = jax.jit(_choices, static_argnums=(3, 4))
