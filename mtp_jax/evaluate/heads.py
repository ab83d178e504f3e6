"""Held-out measures of every head: loss, accuracy, and what decoding gains.

The decoder's gain is predicted without decoding. A pass whose drafts were
made at position t writes 1 + a(t) tokens, a(t) the accepted drafts, and the
next one drafts at t + 1 + a(t). Following that walk over a text, with head 1
verifying the other heads' drafts against the text itself, gives tokens per
forward pass; on a text that the model itself wrote greedily it gives exactly
what `decode.loop` then counts.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import loss
from mtp_jax.data import batch as batch_lib
from mtp_jax.loss import cross_entropy
from mtp_jax.model import attention, model

BLOCK = 64  # positions whose logits are alive at once


def measure(
  net: model.Model,
  batches: Iterable[batch_lib.Batch],
  *,
  block: int = BLOCK,
  kernel: attention.Kernel = attention.xla,
) -> dict[str, np.ndarray]:
  """Averages of `score` over batches.

  Args:
    net: the model.
    batches: windows of T+reach tokens, T >= N.
    block: positions whose logits are alive at once.
    kernel: of the attention, see `layers.training_context`.

  Returns:
    nats [N]: mean loss of each head, nats per token.
    accuracy [N]: share of targets that are the head's first choice.
    greedy, sampled: tokens per forward pass, the bonus token included, from 1
      to N; see `score`.
    Means are weighted as the loss is; 0 where all weights are 0.

  Raises:
    ValueError: no batches, or windows shorter than N.
  """
  sums = None
  for batch in batches:
    new = score(net, batch, block=block, kernel=kernel)
    sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
  if sums is None:
    raise ValueError("there is no batch to measure on")
  s = jax.device_get(sums)

  def mean(sum_, count):
    return sum_ / np.where(count > 0, count, 1)

  return {
    "nats": mean(s["nats"], s["targets"]),
    "accuracy": mean(s["hits"], s["targets"]),
    "greedy": mean(s["greedy_tokens"], s["greedy_passes"]),
    "sampled": mean(s["sampled_tokens"], s["sampled_passes"]),
  }


@functools.partial(jax.jit, static_argnames=("block", "kernel"))
def score(
  net: model.Model,
  batch: batch_lib.Batch,
  *,
  block: int = BLOCK,
  kernel: attention.Kernel = attention.xla,
) -> dict[str, jax.Array]:
  """Sums over one batch, from which `measure` takes means.

  A draft of head i at t is accepted where it is head 1's own first choice at
  t+i-1 (greedy), or with probability sum_x min(p_1(x), p_i(x)) (sampled at
  temperature 1, as lossless speculative sampling accepts; the path before it
  is taken to be the text's). Heads behind a gap of `offsets` draft nothing, but
  have a loss. A stretch of tokens of weight 0 is a prompt: no
  pass drafts in it, and the next one begins at its last token.

  Heads run one after another. Head 1's states stay, and its logits are computed
  once more beside each head's, so that no [N, B, T, D] or [B, T, V] array
  exists.

  Args:
    net: the model.
    batch: windows of T+reach tokens.
    block: positions whose logits are alive at once, for one head beside
      head 1.
    kernel: of the attention; one program per kernel.

  Returns:
    float32 sums: nats, hits and targets [N], each target counted with its
    weight; tokens and passes of greedy and of sampled decoding.

  Raises:
    ValueError: windows shorter than N.
  """
  N, reach = net.cfg.n_future, net.cfg.reach
  T = batch.tokens.shape[1] - reach
  if T < reach:
    raise ValueError(
      f"evaluation needs windows of at least {reach} tokens for {N} heads, not "
      f"{T}: raise data.seq_len or lower model.n_future"
    )
  targets = loss.future_targets(batch, N, net.cfg.offsets)
  inputs = net.read(batch.tokens, batch.segments, kernel=kernel)
  per_head = _per_head(net, inputs, targets, block)
  sums = {name: per_head[name] for name in ("nats", "hits")}
  sums["targets"] = targets.weight_sums()
  drafting = slice(net.cfg.drafting)
  drafted = jax.tree.map(lambda a: a[drafting], targets)
  inside, starts, counted = _places(batch, drafted)
  for name in ("greedy", "sampled"):
    accept = (per_head[name][drafting] * inside)[1:]
    passes, tokens = expected_passes(accept, starts, counted)
    sums[f"{name}_tokens"], sums[f"{name}_passes"] = tokens, passes
  return jax.tree.map(lambda x: x.astype(jnp.float32), sums)


def tokens_per_forward(
  net: model.Model,
  batches: Iterable[batch_lib.Batch],
  heads: tuple[int, ...],
  *,
  block: int = BLOCK,
  kernel: attention.Kernel = attention.xla,
) -> dict[int, float]:
  """`measure`'s `greedy` for decoders that use the first k heads alone.

  Args:
    net: the model.
    batches: windows of T+reach tokens, T >= N.
    heads: every k, from 1 to the heads that can draft (`cfg.drafting`).
    block: positions whose logits are alive at once.
    kernel: of the attention, see `layers.training_context`.

  Returns:
    k -> tokens per forward pass, from 1 to k.

  Raises:
    ValueError: no batches, or a k that the model has not.
  """
  for k in heads:
    if not 1 <= k <= net.cfg.drafting:
      raise ValueError(f"k={k} is outside 1..{net.cfg.drafting}")
  sums = [_greedy(net, batch, heads, block, kernel) for batch in batches]
  if not sums:
    raise ValueError("there is no batch to measure on")
  passes, tokens = np.sum(jax.device_get(sums), 0)  # [k] each
  return dict(
    zip(heads, (tokens / np.maximum(passes, 1)).tolist(), strict=True)
  )


@functools.partial(jax.jit, static_argnames=("heads", "block", "kernel"))
def _greedy(net, batch, heads, block, kernel):
  """Passes and tokens [2, k] of greedy decoding with the first k heads."""
  targets = loss.future_targets(batch, net.cfg.n_future, net.cfg.offsets)
  inputs = net.read(batch.tokens, batch.segments, kernel=kernel)
  agrees = _per_head(net, inputs, targets, block)["greedy"]
  found = []
  for k in heads:
    first = jax.tree.map(lambda a, k=k: a[:k], targets)
    inside, *places = _places(batch, first)
    found.append(expected_passes((agrees[:k] * inside)[1:], *places))
  return jnp.array(found).T


def _per_head(net, inputs, targets, block):
  """Loss, hits and accepted drafts of each head, one head after another.

  Returns:
    nats, hits: [N] sums, each target counted with its weight.
    greedy, sampled: [N, B, T] whether head 1 accepts the draft that the head
      makes at t, and with which probability.
  """
  B, T = inputs.z.shape[:2]
  ahead = net.cfg.reach - 1
  first = jnp.pad(net.heads.first(inputs), ((0, 0), (0, ahead), (0, 0)))
  verifier = net.heads.unembedding(0)

  def log_p(hidden, unembed):
    unembed = unembed.astype(hidden.dtype)
    return jax.nn.log_softmax(cross_entropy.project(hidden, unembed))

  def one_head(hidden, unembed, xs):
    i, target = xs
    verifying = jax.lax.dynamic_slice_in_dim(first, i, T, 1)

    def one_block(_, xs):
      hidden, verifying, target, weight = xs
      own, verified = log_p(hidden, unembed), log_p(verifying, verifier)
      picked = jnp.take_along_axis(own, jnp.maximum(target, 0)[..., None], -1)
      choice = own.argmax(-1)
      return None, {
        "nats": -jnp.where(target >= 0, picked[..., 0] * weight, 0.0).sum(),
        "hits": jnp.where(choice == target, weight, 0.0).sum(),
        "greedy": choice == verified.argmax(-1),
        "sampled": jnp.exp(jnp.minimum(own, verified)).sum(-1),
      }

    xs = (
      cross_entropy.in_blocks(hidden, block),
      cross_entropy.in_blocks(verifying, block),
      *cross_entropy.targets_in_blocks(target, block),
    )
    per_block = jax.lax.scan(one_block, None, xs)[1]
    sums = {name: per_block[name].sum() for name in ("nats", "hits")}
    for name in ("greedy", "sampled"):  # [blocks, B, T / blocks] -> [B, T]
      sums[name] = jnp.moveaxis(per_block[name], 0, 1).reshape(B, -1)[:, :T]
    return sums

  # Head 1 verifies a draft where it predicts the same token.
  places = jnp.array(net.cfg.distances) - 1
  return net.heads.one_by_one(one_head, inputs, (places, targets))


def _places(batch, targets):
  """Where drafts count, where a pass is certain to draft, which passes count.

  A draft counts [N, B, T] where its place and the next token's are inside the
  window, the document and the stretch with weights. A pass drafts [B, T] where
  a document begins or a prompt ends. A pass counts [B, T] if all heads' targets
  are inside the window, and the next token has a weight.
  """
  N, B, T = targets.tokens.shape
  scored = (targets.tokens >= 0) & (targets.weight > 0)
  in_window = jnp.arange(T) + jnp.arange(N)[:, None] < T
  inside = scored & scored[0] & in_window[:, None]
  documents, first_token = batch.segments, jnp.ones((B, 1), bool)
  starts = (documents[:, 1:T] != documents[:, : T - 1]) | (
    scored[0, :, 1:] & ~scored[0, :, :-1]
  )
  starts = jnp.concatenate([first_token, starts], 1)
  counted = (jnp.arange(T) <= T - N) & scored[0]
  return inside, starts, counted


def expected_passes(
  accept: jax.Array, starts: jax.Array, counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Passes that decode a text, and the tokens that they write.

  Args:
    accept: [N-1, B, T] probability that the draft of head i+2 made at t is
      accepted once the ones before it are.
    starts: [B, T] where a document begins or a prompt ends: a pass drafts
      there for certain.
    counted: [B, T] positions that count.

  Returns:
    (passes, tokens): expected numbers, float32; tokens counts the accepted
    drafts and one bonus token of each pass.
  """
  at_least = jnp.cumprod(accept.astype(jnp.float32), 0)
  ones = jnp.ones((1, *starts.shape), jnp.float32)
  at_least = jnp.concatenate([ones, at_least, 0 * ones])
  exactly = at_least[:-1] - at_least[1:]  # [N, B, T] 0, 1, ... are accepted

  def step(mass, xs):  # mass [N, B]: probability of drafting at t, t+1, ...
    exactly, starts, counted = xs
    here = jnp.where(starts, 1.0, mass[0])
    ahead = jnp.concatenate([mass[1:], jnp.zeros_like(mass[:1])])
    written = here * (exactly * jnp.arange(1, len(mass) + 1)[:, None]).sum(0)
    sums = (
      jnp.where(counted, here, 0).sum(),
      jnp.where(counted, written, 0).sum(),
    )
    return ahead + here * exactly, sums

  xs = jnp.moveaxis(exactly, 2, 0), starts.T, counted.T
  passes, tokens = jax.lax.scan(step, jnp.zeros(exactly.shape[:2]), xs)[1]
  return passes.sum(), tokens.sum()
