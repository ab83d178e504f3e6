"""Held-out measures of every head: loss, accuracy, and what decoding gains.

The decoder's gain is predicted without decoding. A pass whose drafts were
made at position t writes 1 + a(t) tokens, a(t) the accepted drafts, and the
next one drafts at t + 1 + a(t). Following that walk over a text, with head 1
verifying the other heads' drafts against the text itself, gives tokens per
forward pass; on a text that the model itself wrote greedily it gives exactly
what `decode.blockwise` then counts.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import loss
from mtp_jax.loss import cross_entropy
from mtp_jax.model import attention, layers, model


def measure(
  net: model.Model,
  batches: Iterable[dict],
  *,
  block: int = 64,
  kernel: attention.Kernel = attention.xla,
) -> dict[str, np.ndarray]:
  """Averages of `score` over batches.

  Args:
    net: the model.
    batches: dicts of tokens and segments, each [B, T+N] int32, T >= N.
    block: positions whose logits are alive at once.
    kernel: of the attention, see `layers.training_context`.

  Returns:
    nats [N]: mean loss of each head, nats per token.
    accuracy [N]: share of targets that are the head's first choice.
    greedy, sampled: tokens per forward pass, the bonus token included, from 1
      to N; see `score`.

  Raises:
    ValueError: no batches, or windows shorter than N.
  """
  sums = None
  for batch in batches:
    new = score(
      net, batch["tokens"], batch["segments"], block=block, kernel=kernel
    )
    sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
  if sums is None:
    raise ValueError("there is no batch to measure on")
  s = jax.device_get(sums)
  targets = np.maximum(s["targets"], 1)
  return {
    "nats": s["nats"] / targets,
    "accuracy": s["hits"] / targets,
    "greedy": s["greedy_tokens"] / max(s["greedy_passes"], 1),
    "sampled": s["sampled_tokens"] / max(s["sampled_passes"], 1),
  }


@functools.partial(jax.jit, static_argnames=("block", "kernel"))
def score(
  net: model.Model,
  tokens: jax.Array,
  segments: jax.Array,
  *,
  block: int = 64,
  kernel: attention.Kernel = attention.xla,
) -> dict[str, jax.Array]:
  """Sums over one batch, from which `measure` takes means.

  A draft of head i at t is accepted where it is head 1's own first choice at
  t+i-1 (greedy), or with probability sum_x min(p_1(x), p_i(x)) (sampled at
  temperature 1, as lossless speculative sampling accepts; the path before it
  is taken to be the text's).

  Args:
    net: the model.
    tokens: [B, T+N] int32.
    segments: [B, T+N] int32 document numbers, 0 for none.
    block: positions whose logits are alive at once, for one head beside
      head 1.
    kernel: of the attention; one program per kernel.

  Returns:
    float32 sums: nats, hits and targets [N]; tokens and passes of the greedy
    and of the sampled walk.

  Raises:
    ValueError: windows shorter than N.
  """
  N = net.cfg.n_future
  B, T = tokens.shape[0], tokens.shape[1] - N
  if T < N:
    raise ValueError(
      f"evaluation needs windows of at least {N} tokens for {N} heads, not "
      f"{T}: raise data.seq_len or lower model.n_future"
    )
  targets = loss.future_targets(tokens, segments, N)
  ctx = layers.training_context(segments[:, :T], net.cfg, kernel)
  hidden = net.heads(net.run_trunk(tokens[:, :T], ctx), ctx)
  block = min(block, T)
  pad = -T % block
  hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, pad + N - 1), (0, 0)))
  padded = jnp.pad(targets, ((0, 0), (0, 0), (0, pad)), constant_values=-1)

  def logits(head, at, size):
    u = net.heads.unembed
    u = u[head] if u.ndim == 3 else u[...]
    h = jax.lax.dynamic_slice_in_dim(hidden[head], at, size, 1)
    return cross_entropy.project(h, u.astype(h.dtype))

  def one_block(_, at):
    first = jax.nn.log_softmax(logits(0, at, block + N - 1))

    def one_head(i):
      own = jax.nn.log_softmax(logits(i, at, block))
      judge = jax.lax.dynamic_slice_in_dim(first, i, block, 1)
      target = jax.lax.dynamic_slice_in_dim(padded[i], at, block, 1)
      picked = jnp.take_along_axis(own, jnp.maximum(target, 0)[..., None], -1)
      choice = own.argmax(-1)
      return {
        "nats": -jnp.where(target >= 0, picked[..., 0], 0.0).sum(),
        "hits": (choice == target).sum(),
        "greedy": choice == judge.argmax(-1),
        "sampled": jnp.exp(jnp.minimum(own, judge)).sum(-1),
      }

    return None, jax.lax.map(one_head, jnp.arange(N))

  found = jax.lax.scan(one_block, None, jnp.arange(0, T + pad, block))[1]
  sums = {name: found[name].sum(0) for name in ("nats", "hits")}
  sums["targets"] = (targets >= 0).sum((1, 2))

  # A draft counts where its place is inside the window and the document.
  seen = jnp.arange(T) + jnp.arange(N)[:, None] < T
  inside = (targets >= 0) & seen[:, None]
  fresh = jnp.concatenate(
    [jnp.ones((B, 1), bool), segments[:, 1:T] != segments[:, : T - 1]], 1
  )
  full = (jnp.arange(T) <= T - N) & (targets[0] >= 0)
  for name in ("greedy", "sampled"):
    accept = jnp.moveaxis(found[name], 0, 2)  # blocks beside their positions
    accept = accept.reshape(N, B, T + pad)[..., :T] * inside
    passes, written = walk(accept[1:], fresh, full)
    sums[f"{name}_tokens"], sums[f"{name}_passes"] = written, passes
  return jax.tree.map(lambda x: x.astype(jnp.float32), sums)


def walk(
  accept: jax.Array, fresh: jax.Array, full: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Passes that decode a text, and the tokens that they write.

  Args:
    accept: [N-1, B, T] probability that the draft of head i+2 made at t is
      accepted once the ones before it are.
    fresh: [B, T] where a document begins: a pass drafts there for certain.
    full: [B, T] positions that count.

  Returns:
    (passes, tokens): expected numbers, float32; tokens counts the accepted
    drafts and one bonus token of each pass.
  """
  reach = jnp.cumprod(accept.astype(jnp.float32), 0)
  ones = jnp.ones((1, *fresh.shape), jnp.float32)
  reach = jnp.concatenate([ones, reach, 0 * ones])
  exactly = reach[:-1] - reach[1:]  # [N, B, T]: j drafts accepted, no more

  def step(mass, xs):  # mass [N, B]: probability of drafting at t, t+1, ...
    exactly, fresh, full = xs
    here = jnp.where(fresh, 1.0, mass[0])
    ahead = jnp.concatenate([mass[1:], jnp.zeros_like(mass[:1])])
    written = here * (exactly * jnp.arange(1, len(mass) + 1)[:, None]).sum(0)
    sums = jnp.where(full, here, 0).sum(), jnp.where(full, written, 0).sum()
    return ahead + here * exactly, sums

  xs = jnp.moveaxis(exactly, 2, 0), fresh.T, full.T
  passes, tokens = jax.lax.scan(step, jnp.zeros(exactly.shape[:2]), xs)[1]
  return passes.sum(), tokens.sum()
