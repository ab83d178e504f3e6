"""Self-speculative decoding of any batch of prompts, by chains or trees.

One forward pass reads a window: the last token of the text and the drafts after
it, as a chain or a tree. Head 1 verifies each draft from the position before
it. The rule accepts a path of drafts and adds one bonus token. From the last
accepted node, heads 2..k draft the next tokens. A pass over a chain of k-1
drafts writes 1 to k tokens; with k = 1 this is ordinary decoding.

  read      memory = absorb(window)                   one trunk pass
  verify    logits = head 1 over the window           [B, M, V]
  accept    node, token = rule(logits, drafts)        [B], [B]
  commit    keep the path to the node; the other heads read it
  draft     rule(heads 2..k at the node)              [B, k-1, R]

Reference: the paper, section 3.2; Stern et al. 2018 (arXiv 1811.03115).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax.decode import accept, checks, prompts
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import network as network_lib
from mtp_jax.decode import tree as tree_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What a decoding loop carries; the first axis of all arrays is the row."""

  tokens: jax.Array  # [B, S] prompts and what was written after them
  length: jax.Array  # [B] tokens so far; the cache holds length - 1 of them
  end: jax.Array  # [B] length at which a row is full
  stop: jax.Array  # [B, E] end tokens; -1 is none
  key: jax.Array  # [B, 2] uint32, each row's own randomness
  drafts: accept.Drafts
  seen: jax.Array | None  # [B, V] bool, where the rule asks for it
  done: jax.Array  # [B] at an end token, at `end`, or at logits not finite
  passes: jax.Array  # [B] decoding passes so far, the prompt's not counted
  written_in: jax.Array  # [B, S] pass that wrote a token; 0: the prompt's
  logprob: jax.Array  # [B, S] of each written token under head 1, nats
  margin: jax.Array  # [B, S] between head 1's best two logits there
  nodes: jax.Array  # [B, M] passes by their last accepted node
  ranks: jax.Array  # [B, k-1, R+1] rank of the true token among candidates
  cache: tuple
  tree: tree_lib.Tree = dataclasses.field(metadata={"static": True})


def begin(
  rule,
  prompt: prompts.Prompt,
  *,
  tree: tree_lib.Tree,
  size: int,
  max_new: jax.Array,
  stop: jax.Array,
  key: jax.Array,
) -> State:
  """Writes the first token and drafts the next ones.

  Args:
    rule: from `accept`.
    prompt: from `prompts.read`, with the tree's heads.
    tree: topology of the drafts.
    size: S, at least P + max_new + M: a last window may reach past the end.
    max_new: [] or [B] int32, most tokens to write.
    stop: [] or [E] int32 ids of end tokens; -1 is none.
    key: [B, 2] uint32, raw keys of the rows.
  """
  B, P = prompt.tokens.shape
  stop = jnp.broadcast_to(
    jnp.atleast_1d(jnp.asarray(stop, jnp.int32)), (B, jnp.size(stop))
  )
  tokens = jnp.zeros((B, size), jnp.int32).at[:, :P].set(prompt.tokens)
  seen = None
  if getattr(rule.sampler, "penalty", None) is not None:
    mine = jnp.arange(P) < prompt.length[:, None]
    seen = jnp.zeros(prompt.logits.shape, bool)
    seen = seen.at[jnp.arange(B)[:, None], prompt.tokens].max(mine)
  keys = _keys(key, jnp.zeros((B,), jnp.int32))
  judged = _judge(
    jnp.zeros((B, 1), jnp.int32), prompt.logits[:, None], None, seen
  )
  _, token = rule.accept(tree_lib.Tree(), judged, keys[:, 0])
  if seen is not None:
    seen = seen.at[jnp.arange(B), token].set(True)
  logprob, margin = _score(judged, jnp.zeros((B, 1), int), token[:, None])
  one = jnp.ones((B, 1), bool)

  def blank(dtype):
    return jnp.zeros((B, size), dtype)

  return State(
    tokens=_put(tokens, token[:, None], prompt.length, one),
    length=prompt.length + 1,
    end=prompt.length + max_new,
    stop=stop,
    key=key,
    drafts=_draft(rule, tree, prompt.drafts, seen, keys[:, 1]),
    seen=seen,
    done=_ends(token[:, None], stop, logprob)[:, 0] | (max_new <= 1),
    passes=jnp.zeros((B,), jnp.int32),
    written_in=blank(jnp.int32),
    logprob=_put(blank(jnp.float32), logprob, prompt.length, one),
    margin=_put(blank(jnp.float32), margin, prompt.length, one),
    nodes=jnp.zeros((B, tree.size), jnp.int32),
    ranks=jnp.zeros((B, tree.drafts, tree.width + 1), jnp.int32),
    cache=prompt.cache,
    tree=tree,
  )


def advance(network, rule, state: State) -> State:
  """One forward pass: verifies drafts, writes 1..k tokens a row, drafts again.

  A row that is done is computed with the others but writes nothing.
  """
  tree, start = state.tree, state.length - 1
  rows = jnp.arange(len(start))[:, None]
  keys = _keys(state.key, state.passes + 1)

  window = jnp.concatenate(
    [
      state.tokens[rows, start[:, None]],
      state.drafts.tokens[:, tree.depth[1:] - 1, tree.rank[1:]],
    ],
    1,
  )
  memory = network.absorb(state.cache, window, start, tree=tree)
  every = jnp.broadcast_to(jnp.arange(tree.size), window.shape)
  judged = _judge(
    window, network.predict(memory, 0, every), state.drafts, state.seen
  )
  node, token = rule.accept(tree, judged, keys[:, 0])

  # The path's tokens, the bonus token after them, and how many are written.
  path = jnp.asarray(tree.path)[node]  # [B, k]
  depth = jnp.asarray(tree.depth)[node]
  place = jnp.arange(tree.heads, dtype=jnp.int32)
  fresh = jnp.pad(window[rows, path[:, 1:]], ((0, 0), (0, 1)))
  fresh = jnp.where(place == depth[:, None], token[:, None], fresh)
  count = jnp.minimum(depth + 1, state.end - state.length)
  logprob, margin = _score(judged, path, fresh)
  stops = _ends(fresh, state.stop, logprob) & (place < count[:, None])
  first = stops.argmax(1).astype(jnp.int32) + 1
  count = jnp.where(stops.any(1), first, count)
  count = jnp.where(state.done, 0, count)
  keep = place < count[:, None]

  memory = network.commit(memory, node)
  seen = state.seen
  if seen is not None:
    seen = seen.at[rows, fresh].max(keep)
  drafts = state.drafts
  if tree.drafts:
    logits = network.draft(memory, tree.heads)
    drafts = _draft(rule, tree, logits, seen, keys[:, 1])

  active = ~state.done
  passes = state.passes + active
  length = state.length + count
  put = functools.partial(_put, start=state.length, keep=keep)
  return dataclasses.replace(
    state,
    tokens=put(state.tokens, fresh),
    length=length,
    drafts=drafts,
    seen=seen,
    done=state.done | stops.any(1) | (length >= state.end),
    passes=passes,
    written_in=put(
      state.written_in, jnp.broadcast_to(passes[:, None], fresh.shape)
    ),
    logprob=put(state.logprob, logprob),
    margin=put(state.margin, margin),
    nodes=state.nodes.at[rows[:, 0], node].add(active),
    ranks=state.ranks
    + _ranks(state.drafts, fresh, depth) * active[:, None, None],
    cache=memory.cache,
  )


def loop(network, rule, state: State, *, until=None) -> State:
  """`advance` until every row is done, in one `while_loop` on the device.

  It also ends before a row's window would exceed the cache (then call `grow`),
  and when `until(state)`, a traced bool, is true.
  """
  room = network.room(state.cache)

  def goes_on(state):
    active = ~state.done
    on = active.any()
    if room is not None:
      needed = jnp.where(active, state.length - 1 + state.tree.size, 0)
      on &= needed.max() <= room
    return on if until is None else on & ~until(state)

  return jax.lax.while_loop(goes_on, lambda s: advance(network, rule, s), state)


def grow(network, state: State) -> State:
  """The state with a cache half as large again, at most of S positions."""
  slots = cache_lib.ladder(network.room(state.cache) + 1)
  slots = min(slots, state.tokens.shape[1])
  return dataclasses.replace(state, cache=network.grow(state.cache, slots))


_MOST = 2**30  # tokens: positions are int32

# As a notebook or a server calls them: shapes compile once, the state's
# buffers are donated.
begin_jit = jax.jit(begin, static_argnames=("tree", "size"))
advance_jit = jax.jit(advance, donate_argnames="state")
run = jax.jit(loop, static_argnames="until", donate_argnames="state")


def plan(
  network, rule, heads: int | tree_lib.Tree, *, max_new: int
) -> tree_lib.Tree:
  """The tree of drafts that `heads` names, once all settings are sound.

  Args:
    heads: a tree, or k for the chain of heads 1..k.

  Raises:
    ValueError: `network` is not a decoder, heads outside 1..N, a tree too
      deep, wide or large, max_new below 1, what is not a rule, a rule's bad
      number, or what is no integer.
  """
  if not hasattr(network, "absorb"):
    raise ValueError(
      "the first argument is the decoder that prepare.decoder(model) returns, "
      f"not an object of type {type(network).__name__}"
    )
  tree = heads
  if not isinstance(heads, tree_lib.Tree):
    heads = checks.integer("heads", heads)
    if not 1 <= heads <= network.n_future:
      raise ValueError(f"heads={heads} is outside 1..{network.n_future}")
    tree = tree_lib.chain(heads)
  if tree.heads > network.n_future:
    raise ValueError(
      f"a tree {tree.drafts} drafts deep needs {tree.heads} heads; the model "
      f"has {network.n_future}"
    )
  if tree.size > network_lib.CHUNK:
    raise ValueError(
      f"a tree of {tree.size} nodes; a pass reads at most {network_lib.CHUNK} "
      "tokens"
    )
  if tree.width > network.vocab:
    raise ValueError(
      f"a tree of {tree.width} candidates per head, but the vocabulary has "
      f"{network.vocab}"
    )
  if checks.integer("max_new", max_new) < 1:
    raise ValueError(f"max_new={max_new} writes nothing; give at least 1")
  if max_new > _MOST:
    raise ValueError(f"max_new={max_new} exceeds {_MOST}")
  accept.check_rule(rule, tree)
  return tree


def row_keys(seed: jax.Array, numbers: jax.Array) -> jax.Array:
  """Raw keys [B, 2] of texts `numbers` [B], whatever batch they are in.

  Args:
    seed: [] uint32, from `checks.seed`.
    numbers: [B] integers.
  """
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.asarray(numbers, jnp.uint32)
  )
  return jax.random.key_data(keys)


def _keys(raw, turn):
  """Keys [B, 2] of a pass: one to accept with, one to draft with."""
  keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(raw), turn)
  return jax.vmap(jax.random.split)(keys)


def _draft(rule, tree, logits, seen, keys):
  if not tree.drafts:
    nothing = logits.shape[0], 0, tree.width
    return accept.Drafts(jnp.zeros(nothing, jnp.int32))
  return rule.propose(logits, tree.width, seen, keys)


def _judge(window, logits, drafts, seen):
  best = logits.argmax(-1).astype(jnp.int32)
  return accept.Judged(window, logits, best, drafts, seen)


def _ends(token, stop, logprob):
  """Whether a text ends with its token: tokens [B, k], stops [B, E].

  So it does where the token's logits were not finite: all that followed would
  be worthless, and `generate.text` says so.
  """
  ends = (token[..., None] == stop[:, None]).any(-1)
  return ends | jnp.isnan(logprob)


def _score(judged, path, fresh):
  """(log-probability, margin) [B, k] of tokens `fresh` after nodes `path`."""
  rows = jnp.arange(len(path))[:, None]
  logits, best = judged.logits[rows, path], judged.best[rows, path]
  others = jnp.where(
    jnp.arange(logits.shape[-1]) == best[..., None], -jnp.inf, logits
  )

  def of(token):
    return jnp.take_along_axis(logits, token[..., None], -1)[..., 0]

  logprob = of(fresh) - jax.nn.logsumexp(logits, -1)
  return logprob, of(best) - others.max(-1)


def _ranks(drafts, fresh, depth):
  """[B, k-1, R+1] int32: rank of each true token among the candidates.

  True tokens are the accepted drafts and the bonus token after them. The last
  column counts true tokens that were not among the candidates.
  """
  D = drafts.tokens.shape[1]
  hit = drafts.tokens == fresh[:, :D, None]  # [B, D, R]
  first = hit & (jnp.cumsum(hit, -1) == 1)
  missed = ~hit.any(-1, keepdims=True)
  known = jnp.arange(D) <= depth[:, None]
  return (jnp.concatenate([first, missed], -1) & known[..., None]).astype(
    jnp.int32
  )


def _put(buffer, new, start, keep):
  """buffer [B, S] with new [B, W] from `start` [B] on, where `keep` [B, W]."""

  def row(buffer, new, start, keep):
    old = jax.lax.dynamic_slice_in_dim(buffer, start, new.shape[0])
    new = jnp.where(keep, new, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, 0)

  return jax.vmap(row)(buffer, new, start, keep)
