"""Blockwise decoding writes what ordinary greedy decoding writes."""

import dataclasses
import functools
import pathlib
import textwrap

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from scipy import stats

from mtp_jax import config, loss, tokenizer
from mtp_jax.data import batch as batch_lib
from mtp_jax.decode import accept, cache, interface, loop, sampling
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import generate as decode
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib
from mtp_jax.model import model

# Two float32 evaluations of a logit at different widths differ by less than
# half of this (measured and asserted below). Where the best two are closer,
# either may win.
EPSILON = 3e-5


# --- A mock: integers, exact at any width ---------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mock:
  """The next token is a sum over the whole prefix; drafts are right to order.

  Its cache holds the tokens themselves: one that is stale, misplaced or
  clamped changes every later choice. A draft that is not to be right has the
  right token second.
  """

  wanted: jax.Array  # [B, S] right first choices of a pass drafted at s, and 1
  vocab: int = dataclasses.field(metadata={"static": True})
  n_future: int = dataclasses.field(metadata={"static": True})
  row_step = 1

  def empty_cache(self, batch, cache_len, heads):
    return (jnp.full((batch, cache_len), 10_000),)

  def capacity(self, cache):
    return cache[0].shape[1]

  def grow(self, cache, slots):
    old = cache[0]
    return (jnp.pad(old, ((0, 0), (0, slots - old.shape[1]))),)

  def forward(self, cache, tokens, start, *, tree=None, valid=None):
    def write(old, new, start):
      return jax.lax.dynamic_update_slice_in_dim(old, new, start, 0)

    cache = jax.vmap(write)(cache[0], tokens, start)
    inputs = {0: jnp.zeros((*tokens.shape, 1))}
    return window_lib.Window((cache,), start, inputs, {}, tree=tree)

  def keep_path(self, window, node):
    cache, start = window.cache[0], window.start[:, None]
    path, depth = (
      jnp.asarray(x)[node] for x in (window.tree.path, window.tree.depth)
    )
    rows = jnp.arange(len(path))[:, None]
    to = start + jnp.arange(path.shape[1])
    cache = cache.at[rows, to].set(cache[rows, start + path])
    return window_lib.Window((cache,), window.start + depth, {}, {})

  def draft(self, window, heads, tokens):
    at = jnp.zeros((len(window.start), 1), jnp.int32)
    logits = [self.logits(window, i, at) for i in range(1, heads)]
    return jnp.concatenate(logits, 1), window

  def logits(self, window, head, at):
    cache, start = window.cache[0], window.start[:, None]
    slot = jnp.arange(cache.shape[1])
    if window.tree is None:
      depth, position = slot, start + at
      seen = slot <= position[..., None]  # [B, W', S]
      place = slot
    else:
      depth, sees = map(jnp.asarray, (window.tree.depth, window.tree.sees))
      position, node = start + depth[at], slot - start  # [B, W'], [B, S]
      inside = jnp.clip(node, 0, len(depth) - 1)
      ours = jax.vmap(lambda a, n: sees[a][:, n])(at, inside)
      ours &= (node < len(depth))[:, None]
      seen = (node < 0)[:, None] | ours
      place = jnp.where(node < 0, slot, start + depth[inside])[:, None]
    total = ((cache[:, None] + 1) * (place + 1) * seen).sum(-1)
    token = total % self.vocab
    for ahead in range(head):
      total += (token + 1) * (position + 2 + ahead)
      token = total % self.vocab
    logits = jax.nn.one_hot(token, self.vocab)
    if head:
      wanted = jnp.take_along_axis(self.wanted, position, 1)
      wrong = jax.nn.one_hot((token + 1) % self.vocab, self.vocab)
      logits += 2 * wrong * (head >= wanted)[..., None]
    return logits


def mock_text(prompt, vocab, max_new, stop=None):
  """What the mock's head 1 writes, in plain Python."""
  text, stops = list(prompt), np.atleast_1d(-1 if stop is None else stop)
  while len(text) < len(prompt) + max_new:
    text.append(sum((t + 1) * (s + 1) for s, t in enumerate(text)) % vocab)
    if text[-1] in stops:
      break
  return text[len(prompt) :]


def mock_counts(prompt, text, wanted, tree):
  """Tokens of each pass, given the whole new text and one row of `wanted`."""
  counts, length = [], len(prompt) + 1
  while length < len(prompt) + len(text):
    path = ()
    for head in range(1, tree.heads):
      step = (*path, 0 if head < wanted[length - 2] else 1)
      if step not in tree.paths:
        break
      path = step
    room = len(prompt) + len(text) - length
    counts.append(min(len(path) + 1, room))
    length += counts[-1]
  return counts


def check_mock(mock, prompts, heads, max_new, stop=None, cache_len=None):
  got = decode.generate(
    mock, prompts, heads=heads, max_new=max_new, stop=stop, cache_len=cache_len
  )
  tree = tree_lib.chain(heads) if isinstance(heads, int) else heads
  for b, prompt in enumerate(prompts):
    text = mock_text(prompt, mock.vocab, max_new, stop)
    counts = mock_counts(prompt, text, mock.wanted[b], tree)
    assert got.tokens[b].tolist() == text
    assert got.per_pass[b].tolist() == counts
    assert got.passes[b] == len(counts)
  written = sum(len(t) - 1 for t in got.tokens)
  if written:
    assert got.tokens_per_forward == pytest.approx(written / sum(got.passes))
  else:
    assert np.isnan(got.tokens_per_forward)
  return got


def start(decoder, prompts, *, cache_len=None, **settings):
  """The state after the prompts' pass."""
  tokens, lengths = prompts_lib.pad(prompts, decoder.vocab)
  checked = interface.check_settings(decoder, **settings)
  return decode.start(decoder, tokens, lengths, checked, cache_len=cache_len)


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_every_acceptance_count_is_forced(k):
  for count in range(1, 6):
    mock = Mock(np.full((3, 79), count), 13, 5)
    got = check_mock(mock, PROMPTS, k, 23)
    for counts in got.per_pass:
      assert set(counts[:-1]) == {min(count, k)}


@pytest.mark.parametrize("k", [2, 5])
def test_rows_accept_different_counts_in_one_pass(k):
  wanted = np.random.default_rng(k).integers(1, 6, (3, 79))
  got = check_mock(Mock(wanted, 13, 5), PROMPTS, k, 23)
  assert len({len(counts) for counts in got.per_pass}) > 1
  assert {c for counts in got.per_pass for c in counts} == set(range(1, k + 1))


def test_a_stop_inside_an_accepted_block_ends_the_row_there():
  inside = 0
  for stop in range(13):
    mock = Mock(np.full((3, 79), 5), 13, 5)
    got = check_mock(mock, PROMPTS, 5, 23, stop=stop)
    for text, counts in zip(got.tokens, got.per_pass, strict=True):
      assert stop not in text[:-1]
      inside += len(counts) > 0 and counts[-1] < 5 and text[-1] == stop
  assert inside >= 13


@pytest.mark.parametrize("heads", ["chain", "tree"])
def test_any_of_several_stops_ends_a_row(heads):
  mock, ends = Mock(np.full((3, 79), 5), 13, 5), set()
  for stop in ([4, 7], [11, 2, 0], np.arange(5, 10)):
    got = check_mock(mock, PROMPTS, {"chain": 5, "tree": TREE}[heads], 23, stop)
    ends |= {int(text[-1]) for text in got.tokens if len(text) < 23}
  assert len(ends) > 3


class Broken(Mock):
  """Its logits are not finite where a text begins with 9."""

  def logits(self, window, head, at):
    logits = super().logits(window, head, at)
    spoilt = window.cache[0][:, 0] == 9
    return jnp.where(spoilt[:, None, None], jnp.nan, logits)


jax.tree_util.register_dataclass(Broken, ["wanted"], ["vocab", "n_future"])


@pytest.mark.parametrize("rule", ["greedy", "drawn"])
def test_logits_that_are_not_finite_end_the_text_with_an_error(rule):
  rule = accept.GREEDY if rule == "greedy" else accept.Lossless()
  mock = Broken(np.full((3, 79), 5), 13, 5)
  with pytest.raises(
    ValueError, match="text 1 .*not finite at its new token 0"
  ):
    decode.generate(
      mock, PROMPTS, heads=3, max_new=23, rule=rule, stop=list(range(13))
    )
  state = start(mock, [[9, 1], [3, 9], [2]], heads=3, max_new=23, rule=rule)
  assert state.done.tolist() == [True, False, False]  # it does not write on


@pytest.mark.parametrize("k", [1, 5])
def test_one_token_takes_no_pass_after_the_prompts(k):
  check_mock(Mock(np.full((3, 79), 5), 13, 5), PROMPTS, k, 1)


def test_the_last_window_may_reach_the_end_of_the_cache():
  """A cache with no position to spare: prompt, new tokens, one window."""
  for longest in (13, 16, 17, 23):
    prompts = [*PROMPTS[:2], [1 + i % 7 for i in range(longest)]]
    wanted = np.random.default_rng(longest).integers(1, 6, (3, 79))
    tight = longest + 11 + 5
    check_mock(Mock(wanted, 13, 5), prompts, 5, 11, cache_len=tight)
    with pytest.raises(ValueError, match=f"prompt 2 has {longest} tokens"):
      check_mock(Mock(wanted, 13, 5), prompts, 5, 11, cache_len=tight - 1)


# Nodes where a right token may come second, at every depth but the last.
TREE = tree_lib.from_paths(
  [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
)


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_writes_the_same_text(seed):
  """The winning path's tokens move into place, in rows at odds."""
  wanted = np.random.default_rng(seed).integers(1, 6, (3, 79))
  mock = Mock(wanted, 13, 5)
  got = check_mock(mock, PROMPTS, TREE, 23, stop=4)
  assert {c for n in got.per_pass for c in n} == {1, 2, 3, 4}
  chain = check_mock(mock, PROMPTS, 4, 23, stop=4)
  assert got.tokens_per_forward > chain.tokens_per_forward


def test_a_chain_is_a_tree_of_one_path():
  mock = Mock(np.random.default_rng(3).integers(1, 6, (3, 79)), 13, 5)
  chain = tree_lib.from_paths([[0], [0, 0], [0, 0, 0]])
  a, b = (check_mock(mock, PROMPTS, heads, 23) for heads in (4, chain))
  for x, y in zip(a.texts, b.texts, strict=True):
    jax.tree.map(np.testing.assert_array_equal, vars(x), vars(y))


def test_counts_of_nodes_and_ranks():
  """Every pass of a row is counted once, at the node that it went on to."""
  wanted = np.random.default_rng(5).integers(1, 6, (3, 79))
  mock = Mock(wanted, 13, 5)
  tree = dataclasses.replace(TREE, candidates=3)
  got = check_mock(mock, PROMPTS, tree, 23)
  for b, text in enumerate(got.texts):
    nodes, ranks = np.zeros(tree.size, int), np.zeros((3, 4), int)
    length = len(PROMPTS[b]) + 1
    for count in text.per_pass:
      path = ()
      for head in range(1, 4):
        rank = 0 if head < wanted[b, length - 2] else 1
        ranks[head - 1, rank] += 1
        if (*path, rank) not in tree.paths:
          break
        path = (*path, rank)
      nodes[((), *tree.paths).index(path)] += 1
      length += count
    np.testing.assert_array_equal(text.nodes, nodes)
    np.testing.assert_array_equal(text.ranks, ranks)
  depth = np.repeat(tree.depth, sum(t.nodes for t in got.texts))
  share = [(depth >= i).mean() for i in range(4)]
  np.testing.assert_allclose(got.accepted, share)
  in_turn = [1, *np.divide(share[1:], share[:-1])]
  np.testing.assert_allclose(got.accepted_in_turn, in_turn)
  ranks = sum(t.ranks for t in got.texts)
  np.testing.assert_allclose(got.ranks, (ranks.T / ranks.sum(1)).T[:, :-1])
  written, passes = sum(len(t) - 1 for t in got.tokens), sum(got.passes)
  assert got.wasted == pytest.approx(1 - written / passes / tree.size)


@pytest.mark.parametrize("longest", [255, 256, 257, 700])
def test_prompts_are_read_in_chunks(longest):
  """Rows that end in every chunk, and a last chunk inside the one before."""
  rng = np.random.default_rng(longest)
  prompts = [
    rng.integers(0, 13, n).tolist() for n in (longest, 3, longest // 2)
  ]
  wanted = rng.integers(1, 6, (3, 1024))
  check_mock(Mock(wanted, 13, 5), prompts, 3, 9)
  tight = longest + 9 + 3
  check_mock(Mock(wanted, 13, 5), prompts, 3, 9, cache_len=tight)


def test_the_cache_grows_with_the_text():
  mock = Mock(np.random.default_rng(0).integers(1, 6, (2, 2048)), 13, 5)
  prompts = [[3, 1, 4], [1, 5]]
  check_mock(mock, prompts, 5, 700)
  state = start(mock, prompts, heads=5, max_new=700)
  room = [mock.capacity(state.cache)]
  while not state.done.all():
    state = loop.run_jit(mock, accept.Greedy(), state)
    if not state.done.all():
      # No pass was taken for which there was no room, and none left out.
      assert room[-1] - 5 < state.length.max() - 1 <= room[-1]
      state = loop.grow(mock, state)
      room.append(mock.capacity(state.cache))
  assert room == [512, 768] and state.tokens.shape[1] == 768


def test_lengths_share_programs():
  """Prompts of any length up to the next power of two, any max_new."""
  mock = Mock(np.full((2, 2048), 3), 13, 5)
  for jitted in (prompts_lib.read_jit, loop.begin_jit, loop.run_jit):
    jitted.clear_cache()
  for length, max_new in ((17, 40), (19, 41), (29, 31), (32, 57)):
    decode.generate(mock, [[1] * length, [2]], heads=3, max_new=max_new)
  for jitted in (prompts_lib.read_jit, loop.begin_jit, loop.run_jit):
    assert jitted._cache_size() == 1


@hypothesis.settings(max_examples=500, deadline=None)
@hypothesis.given(
  prompts=st.lists(
    st.lists(st.integers(-1, 13), max_size=19), min_size=3, max_size=3
  ),
  k=st.sampled_from([1, 3, 5]),
  max_new=st.sampled_from([0, 1, 17]),
  cache_len=st.sampled_from([None, 38]),
  stop=st.none() | st.integers(0, 12),
  seed=st.integers(0, 2**32 - 1),
)
def test_any_prompts_are_decoded_or_refused(
  prompts, k, max_new, cache_len, stop, seed
):
  """Never a clamped write: exact text, or a ValueError that names the value."""
  wanted = np.random.default_rng(seed).integers(1, 6, (3, 79))
  mock = Mock(wanted, 13, 5)
  error = None
  for i, prompt in enumerate(prompts):
    if cache_len and len(prompt) + max_new + k > cache_len:
      error = f"prompt {i} has {len(prompt)} tokens"
      break
  for i, prompt in enumerate(prompts):
    bad = [t for t in prompt if not 0 <= t < 13]
    if bad or not prompt:
      error = f"prompt {i} holds id {bad[0]}" if bad else f"prompt {i} is empty"
      break
  if max_new < 1:
    error = f"max_new={max_new} writes nothing"
  if error is None:
    check_mock(mock, prompts, k, max_new, stop, cache_len)
    return
  with pytest.raises(ValueError, match=error):
    check_mock(mock, prompts, k, max_new, stop, cache_len)


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"heads": 0}, "heads=0 is outside 1..5"),
    ({"heads": 6}, "heads=6 is outside 1..5"),
    ({"max_new": 0}, "max_new=0 writes nothing"),
    ({"max_new": -3}, "max_new=-3 writes nothing"),
    ({"cache_len": 20}, "prompt 2 has 13 tokens; with 9 positions"),
    ({"cache_len": 0}, "prompt 0 has 5 tokens"),
    ({"prompts": []}, "no prompts"),
  ],
)
def test_settings_out_of_bounds(settings, words):
  mock = Mock(np.ones((3, 79), int), 13, 5)
  settings = {"prompts": PROMPTS, "heads": 2, "max_new": 7} | settings
  with pytest.raises(ValueError, match=words):
    decode.generate(mock, **settings)


def test_start_refuses_a_cache_that_a_window_would_leave():
  mock = Mock(np.ones((3, 79), int), 13, 5)
  with pytest.raises(ValueError, match="16 tokens.* need 25 .*cache_len=24"):
    start(mock, PROMPTS, cache_len=24, heads=2, max_new=7)


def test_drafting_heads_work_at_one_place_only():
  """Heads 2..k answer at the accepted place, head 1 on the whole window."""
  asked = []

  class Spy(Mock):
    def logits(self, window, head, at):
      asked.append((head, at.shape[1]))
      return super().logits(window, head, at)

  wanted = np.ones((3, 79), int)
  for tree, width in ((tree_lib.chain(4), 4), (TREE, 9)):
    state = start(Mock(wanted, 13, 5), PROMPTS, heads=tree, max_new=7)
    asked.clear()
    loop.advance(Spy(wanted, 13, 5), accept.GREEDY, state)
    drafted = [(i, 1) for i in range(1, tree.heads)]
    assert asked == [(0, width), *drafted]


def test_passes_from_the_host_equal_the_loop():
  wanted = np.random.default_rng(7).integers(1, 6, (3, 79))
  mock = Mock(wanted, 13, 5)
  want = check_mock(mock, PROMPTS, 5, 23, stop=4)
  state = start(mock, PROMPTS, heads=5, max_new=23, stop=4)
  seen = 0
  while not state.done.all():
    state = loop.advance_jit(mock, accept.Greedy(), state)
    assert state.length.sum() > seen
    seen = state.length.sum()
  got = decode.collect(state, list(map(len, PROMPTS)))
  for a, b in zip(got, want.texts, strict=True):
    jax.tree.map(np.testing.assert_array_equal, vars(a), vars(b))
  np.testing.assert_array_equal(state.statistics.passes, want.passes)


TABLES = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3, 3)) * 1.5)


class Tables(Mock):
  """Every head looks its logits up by the token at the place: [N, V, V]."""

  def logits(self, window, head, at):
    rows = jnp.arange(len(at))[:, None]
    token = window.cache[0][rows, window.start[:, None] + at]
    return TABLES[head, token].astype(jnp.float32)


jax.tree_util.register_dataclass(Tables)


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "best"])
@pytest.mark.parametrize(
  "tree",
  [tree_lib.chain(3), tree_lib.from_paths([[0], [1], [0, 0], [1, 0]])],
  ids=["chain", "tree"],
)
def test_whole_texts_have_head_1s_law(tree, drawn):
  """The loop draws, counts what the text holds, and keys its passes apart."""
  sampler = sampling.Sampler(temperature=0.9, penalty=1.7)
  rows, new, first = 60_000, 4, 1
  got = decode.generate(
    Tables(np.zeros((rows, 1), int), 3, 3),
    np.full((rows, 1), first),
    heads=tree,
    max_new=new,
    rule=accept.Lossless(sampler, drawn),
    seed=1,
  )
  assert got.tokens_per_forward > 1.3  # drafts do stand
  law = np.zeros((3,) * new)
  for text in np.ndindex(law.shape):
    chance, seen, last = 1.0, np.arange(3) == first, first
    for token in text:
      chance *= float(sampler.probabilities(TABLES[0, last], seen)[token])
      seen, last = seen | (np.arange(3) == token), token
    law[text] = chance
  counts = np.zeros(law.shape)
  np.add.at(counts, tuple(np.stack(got.tokens).T), 1)
  assert law.sum() == pytest.approx(1)
  found = stats.chisquare(counts.ravel(), rows * law.ravel() / law.sum())
  assert found.pvalue > 1e-3


# --- The network ------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=1)
def read(decoder, cache, window, start, at):
  """One pass for the references below: cache, and head 1's logits at `at`."""
  window = decoder.forward(cache, window, start)
  return window.cache, decoder.logits(window, 0, at)


uncached = jax.jit(lambda net, tokens: net(tokens)[0])


CACHE, MAX_NEW = 60, 41  # one cache length, so that programs are shared


def greedy(decoder, prompts, k, max_new):
  """Ordinary greedy decoding whose every pass is k tokens wide.

  One token per pass: the window is the last token and k-1 zeros, and what the
  zeros wrote into the cache is overwritten by the passes that follow.
  """
  texts = [list(p) for p in prompts]
  tokens = np.zeros((len(prompts), 16), np.int32)
  for b, prompt in enumerate(prompts):
    tokens[b, : len(prompt)] = prompt
  cache = decoder.empty_cache(len(prompts), CACHE, 1)
  last = np.array([[len(p) - 1] for p in prompts], np.int32)
  cache, logits = read(decoder, cache, tokens, 0 * last[:, 0], last)
  at = np.broadcast_to(np.arange(k, dtype=np.int32), (len(prompts), k))
  for _ in range(max_new):
    choices = np.asarray(logits)[:, 0].argmax(-1)
    for text, choice in zip(texts, choices, strict=True):
      text.append(int(choice))
    window = np.zeros((len(prompts), k), np.int32)
    window[:, 0] = choices
    start = np.array([len(text) - 1 for text in texts], np.int32)
    cache, logits = read(decoder, cache, window, start, at)
  return [t[len(p) :] for t, p in zip(texts, prompts, strict=True)]


def cut(text, stop):
  """The text up to its first stop token, that included."""
  text = list(text)
  return text[: text.index(stop) + 1] if stop in text else text


class Ties:
  """Compares texts with ordinary greedy ones, and counts near-ties.

  Args:
    net: the model, which judges without a cache.
    prompts, texts: what ordinary greedy decoding writes after each prompt.
    rows: batch size of the judging program, so that it compiles once.
  """

  def __init__(self, net, prompts, texts, rows):
    longest = max(len(p) + len(t) for p, t in zip(prompts, texts, strict=True))
    tokens = np.zeros((rows, longest), np.int32)
    for row, p, t in zip(tokens, prompts, texts, strict=False):
      row[: len(p) + len(t)] = [*p, *t]
    logits = np.asarray(uncached(net, tokens))
    best = np.sort(logits, -1)[..., -2:]
    self.texts, self.margins, self.error = texts, [], 0.0
    for b, (p, t) in enumerate(zip(prompts, texts, strict=True)):
      places = np.arange(len(p) - 1, len(p) + len(t) - 1)
      chosen = logits[b, places, np.array(t)]
      # The text itself is greedy: its choices are best but for near-ties.
      assert (best[b, places, 1] - chosen < EPSILON).all()
      self.margins.append(best[b, places, 1] - best[b, places, 0])
    self.compared = self.flips = 0
    self.near = sum(int((m < EPSILON).sum()) for m in self.margins)

  def check(self, row, text):
    """`text` is the row's up to its end, or to a near-tie decided otherwise."""
    want = self.texts[row][: len(text)]
    differ = np.flatnonzero(np.array(want) != np.array(text))
    self.compared += len(text) if not differ.size else int(differ[0])
    if differ.size:
      assert self.margins[row][differ[0]] < EPSILON, (row, differ[0])
      self.flips += 1

  def report(self, name):
    print(
      f"{name}: {self.compared} tokens compared, {self.near} of "
      f"{sum(map(len, self.texts))} greedy choices within {EPSILON} of a tie, "
      f"{self.flips} fell the other way"
    )


def create(cfg, seed, deviation):
  """A random model, made without compiling an initialiser."""
  rng, key = np.random.default_rng(seed), jax.random.key(0)

  def fill(path, a):
    is_norm = "norm" in jax.tree_util.keystr(path)
    value = is_norm + rng.normal(size=a.shape) * deviation
    return jnp.asarray(value, jnp.float32)

  net = jax.eval_shape(lambda: model.Model(cfg, key))
  return jax.tree_util.tree_map_with_path(fill, net)


@pytest.fixture(scope="module")
def trained():
  """A byte model after some seconds on a module of the standard library."""
  cfg = config.Model(
    width=32, mlp=88, layers=4, attn_heads=4, kv_heads=2, n_future=3
  )
  codec = tokenizer.Bytes()
  text = codec.encode(pathlib.Path(textwrap.__file__).read_bytes())
  rng, N, T = np.random.default_rng(0), cfg.n_future, 64
  net = create(cfg, 0, 0.15)
  tx = optax.adam(optax.cosine_decay_schedule(1e-2, 200))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(net, opt, tokens):
    windows = batch_lib.of(tokens)
    targets = loss.future_targets(windows, N)
    scale = jnp.full(N, 1 / targets.tokens[0].size)

    def nats(net):
      return loss.token_loss(
        net, windows, targets, scale, loss.Settings(implementation="formula")
      )

    grads, per_head = jax.grad(nats, has_aux=True)(net)
    updates, opt = tx.update(grads, opt, net)
    return optax.apply_updates(net, updates), opt, per_head * scale

  opt = tx.init(net)
  for _ in range(200):
    starts = rng.integers(0, len(text) - T - N, 8)
    batch = np.stack([text[s : s + T + N] for s in starts])
    net, opt, per_head = step(net, opt, batch)
  print("nats per byte and head:", per_head)
  lengths = (1, 2, 3, 5, 7, 11, 13)
  prompts = [text[997 * n : 997 * n + n].tolist() for n in lengths]
  return net, prompts


@pytest.fixture(scope="module")
def ordinary(trained):
  """Ordinary greedy texts of the prompts, and their judge."""
  net, prompts = trained
  texts = decode.generate(
    decoder_lib.lay_out(net), prompts, heads=1, max_new=MAX_NEW, cache_len=CACHE
  ).tokens
  return Ties(net, prompts, texts, len(prompts))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_trained_model_at_batches_of_one_to_seven(trained, ordinary, k):
  net, prompts = trained
  decoder = decoder_lib.lay_out(net)
  for size in range(1, 8):
    batch = prompts[:size]
    run = functools.partial(
      decode.generate,
      decoder,
      batch,
      heads=k,
      max_new=MAX_NEW,
      cache_len=CACHE,
    )
    got = run()
    same_width = greedy(decoder, batch, k, MAX_NEW)
    assert [t.tolist() for t in got.tokens] == same_width
    for row, text in enumerate(got.tokens):
      ordinary.check(row, text.tolist())
    stop = ord(" ")
    for text, want in zip(run(stop=stop).tokens, same_width, strict=True):
      assert text.tolist() == cut(want, stop)
  ordinary.report(f"trained, k={k}")
  print(f"{got.tokens_per_forward:.3f} tokens per forward at batch 7")
  if k > 1:
    assert 1.1 < got.tokens_per_forward < k - 0.1
    assert len({len(counts) for counts in got.per_pass}) > 1


def test_a_row_does_not_depend_on_its_batch(trained, ordinary):
  net, prompts = trained
  decoder = decoder_lib.lay_out(net)
  for row, prompt in enumerate(prompts):
    alone = decode.generate(
      decoder, [prompt], heads=3, max_new=MAX_NEW, cache_len=CACHE
    )
    ordinary.check(row, alone.tokens[0].tolist())


@pytest.mark.parametrize("rule", ["greedy", "drawn"])
def test_log_probabilities_and_margins_are_head_1s(trained, ordinary, rule):
  """Of every token written, by a chain or a tree, as the uncached model has."""
  net, prompts = trained
  decoder = decoder_lib.lay_out(net)
  sampler = sampling.Sampler(temperature=0.7, top_k=40)
  rule = accept.GREEDY if rule == "greedy" else accept.Lossless(sampler)
  for heads in (3, tree_lib.from_paths([[0], [1], [0, 0], [1, 0]])):
    got = decode.generate(
      decoder, prompts, heads=heads, max_new=MAX_NEW, rule=rule, seed=5
    )
    tokens = np.zeros((len(prompts), 13 + MAX_NEW), np.int32)
    for row, p, t in zip(tokens, prompts, got.tokens, strict=True):
      row[: len(p) + len(t)] = [*p, *t]
    logits = np.asarray(uncached(net, tokens), np.float64)
    for b, (p, text) in enumerate(zip(prompts, got.texts, strict=True)):
      places = np.arange(len(p) - 1, len(p) + len(text.tokens) - 1)
      here = logits[b, places]
      best = np.sort(here)[:, -2:]
      total = np.log(np.exp(here).sum(-1))
      chosen = here[np.arange(len(places)), text.tokens]
      for found, want in (
        (text.logprob, chosen - total),
        (text.margin, best[:, 1] - best[:, 0]),
      ):
        np.testing.assert_allclose(found, want, rtol=0, atol=EPSILON)
    margins = np.concatenate([t.margin for t in got.texts])
    assert got.near_ties(0.5) == pytest.approx((margins < 0.5).mean())
    assert 0 < got.near_ties(0.5) < 1


TREE3 = tree_lib.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 0]])


@pytest.mark.parametrize(
  "settings, epsilon",
  [
    ({}, EPSILON),
    ({"draft_dtype": "int8"}, EPSILON),
    ({"sliding_window": 8}, EPSILON),
    # Where a key rounds the other way, logits are off by a step of the cache.
    ({"cache_dtype": "bfloat16"}, 0.05),
    ({"cache_dtype": "int8"}, 0.05),
  ],
  ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_tree_writes_ordinary_decodings_text(trained, settings, epsilon):
  """With second and third choices that stand, on caches of every kind."""
  net, prompts = trained
  decoder = decoder_lib.lay_out(net, **settings)
  run = functools.partial(decode.generate, decoder, prompts, max_new=MAX_NEW)
  want, got = run(heads=1), run(heads=TREE3)
  for a, b in zip(want.texts, got.texts, strict=True):
    differ = np.flatnonzero(a.tokens != b.tokens)
    assert not differ.size or a.margin[differ[0]] < epsilon
  nodes = sum(t.nodes for t in got.texts)
  others = np.setdiff1d(np.arange(TREE3.size), TREE3.spine)
  assert nodes[others].sum() > 5
  assert got.tokens_per_forward > run(heads=3).tokens_per_forward


def test_a_ring_grows_until_it_is_whole(trained, monkeypatch):
  net, prompts = trained
  monkeypatch.setattr(window_lib, "CHUNK", 16)
  monkeypatch.setattr(cache, "ladder", lambda needed: -(-needed // 16) * 16)
  decoder = decoder_lib.lay_out(net, sliding_window=41)
  run = functools.partial(decode.generate, decoder, prompts, max_new=150)
  assert decoder.capacity(decoder.empty_cache(1, 56, 1)) == 56
  assert decoder.capacity(decoder.empty_cache(1, 99, 1)) is None
  want = run(heads=3)
  monkeypatch.setattr(cache, "ladder", lambda needed: 999)  # at once
  for a, b in zip(want.texts, run(heads=3).texts, strict=True):
    differ = np.flatnonzero(a.tokens != b.tokens)
    assert not differ.size or a.margin[differ[0]] < EPSILON


def test_logits_of_two_widths_stay_within_epsilon(trained, ordinary):
  """What EPSILON stands on: the error of a logit is below half of it."""
  net, prompts = trained
  decoder = decoder_lib.lay_out(net)
  texts = [[*p, *t] for p, t in zip(prompts, ordinary.texts, strict=True)]
  tokens = np.array([t[: 1 + MAX_NEW] for t in texts], np.int32)
  want = np.asarray(uncached(net, tokens))
  worst = 0.0
  for k in (1, 3):
    cache = decoder.empty_cache(7, CACHE, 1)
    at = np.broadcast_to(np.arange(k, dtype=np.int32), (7, k))
    for s in range(0, MAX_NEW - k, k):
      start = np.full(7, s, np.int32)
      cache, got = read(decoder, cache, tokens[:, s : s + k], start, at)
      worst = max(worst, np.abs(np.asarray(got) - want[:, s : s + k]).max())
  print(f"largest difference of a logit: {worst:.1e}")
  assert worst < EPSILON / 2


# --- Random models, and heads that always or never agree ---------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rigged(window_lib.Transformer):
  """A model whose drafts are the greedy text up to `wanted` tokens a pass."""

  texts: jax.Array  # [B, S] prompt and greedy text
  wanted: jax.Array  # []

  def draft(self, window, heads, tokens):
    heads = jnp.arange(1, heads)
    position = window.start[:, None] + 1 + heads
    token = jnp.take_along_axis(self.texts, position, 1, mode="clip")
    token = token + (heads >= self.wanted)
    return jax.nn.one_hot(token % self.vocab, self.vocab), window


def random_model(kind, seed):
  blocks = 0 if kind in ("linear", "unembedding") else 4
  cfg = config.Model(
    vocab=31,
    width=24,
    mlp=41,
    layers=1 + blocks,
    attn_heads=6,
    kv_heads=2,
    n_future=4,
    head=kind,
  )
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(0, 31, n).tolist() for n in rng.integers(1, 17, 208)]
  return create(cfg, seed, 0.3), prompts


def plain(net, prompts):
  texts = decode.generate(
    decoder_lib.lay_out(net), prompts, heads=1, max_new=64
  ).tokens
  return Ties(net, prompts, texts, len(prompts))


@pytest.mark.parametrize("kind", config.HEAD_KINDS)
def test_random_models_lose_nothing(kind):
  """208 prompts of 64 tokens each, every k, all tokens equal."""
  net, prompts = random_model(kind, 0)
  want, decoder = plain(net, prompts), decoder_lib.lay_out(net)
  for k in (2, 3, 4) if kind == "parallel" else (3,):
    got = decode.generate(decoder, prompts, heads=k, max_new=64)
    for row, text in enumerate(got.tokens):
      want.check(row, text.tolist())
    print(f"{got.tokens_per_forward:.3f} tokens per forward, k={k}")
  want.report(f"random, {kind}")


@pytest.mark.parametrize("seed", [0, 1])
def test_heads_that_always_or_never_agree_lose_nothing(seed):
  net, prompts = random_model("parallel", seed)
  want = plain(net, prompts)
  texts = np.zeros((len(prompts), 16 + 64 + 4), np.int32)
  for row, p, t in zip(texts, prompts, want.texts, strict=True):
    row[: len(p) + len(t)] = [*p, *t]
  for count in (1, 4):
    decoder = decoder_lib.lay_out(net)
    rigged = Rigged(**vars(decoder), texts=texts, wanted=np.int32(count))
    got = decode.generate(rigged, prompts, heads=4, max_new=64)
    for row, text in enumerate(got.tokens):
      want.check(row, text.tolist())
    if not want.flips:  # 63 = 15 passes of 4 tokens and one of 3
      assert set(got.passes) == {63 if count == 1 else 16}
  want.report(f"rigged, seed {seed}")
