"""The loop writes what ordinary decoding writes; a mock forces its paths."""

import dataclasses
import math
import pathlib
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from mtp_jax import config
from mtp_jax.decode import accept, interface, layout, loop, sampling
from mtp_jax.decode import generate as decode
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model
from tests import parameters
from tests.mocks import (
  PROMPTS,
  TREE,
  Broken,
  Mock,
  Sequential,
  check_mock,
  start,
)

_INFO = pathlib.Path("/proc/cpuinfo")
CPU = _INFO.read_text("utf-8") if _INFO.exists() else ""


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


@pytest.mark.parametrize("rule", ["greedy", "drawn"])
def test_logits_that_are_not_finite_end_the_text_with_an_error(rule):
  rule = accept.GREEDY if rule == "greedy" else accept.SpeculativeSampling()
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
    tight = longest + 11 + 5 - 1
    check_mock(Mock(wanted, 13, 5), prompts, 5, 11, cache_len=tight)
    with pytest.raises(ValueError, match=f"prompt 2 has {longest} tokens"):
      check_mock(Mock(wanted, 13, 5), prompts, 5, 11, cache_len=tight - 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_writes_the_same_text(seed):
  """The winning path's tokens move into place, in rows at odds."""
  wanted = np.random.default_rng(seed).integers(1, 6, (3, 79))
  mock = Mock(wanted, 13, 5)
  got = check_mock(mock, PROMPTS, TREE, 23, stop=4)
  assert {c for n in got.per_pass for c in n} == {1, 2, 3, 4}
  chain = check_mock(mock, PROMPTS, 4, 23, stop=4)
  assert got.tokens_per_forward > chain.tokens_per_forward


@pytest.mark.parametrize("k", [2, 3, 5])
def test_heads_that_read_tokens_draft_one_after_another(k):
  """From the bonus token and the drafts before; a wrong one would show."""
  wanted = np.random.default_rng(k).integers(1, 6, (3, 79))
  got = check_mock(Sequential(wanted, 13, 5), PROMPTS, k, 23)
  assert {c for n in got.per_pass for c in n} == set(range(1, k + 1))


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
    np.testing.assert_array_equal(text.rank_counts, ranks)
  depth = np.repeat(tree.depth, sum(t.nodes for t in got.texts))
  share = [(depth >= i).mean() for i in range(4)]
  np.testing.assert_allclose(got.accepted, share)
  in_turn = [1, *np.divide(share[1:], share[:-1])]
  np.testing.assert_allclose(got.accepted_in_turn, in_turn)
  ranks = sum(t.rank_counts for t in got.texts)
  np.testing.assert_allclose(
    got.rank_acceptance, (ranks.T / ranks.sum(1)).T[:, :-1]
  )
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
  assert room == [256, 384, 640, 768] and state.tokens.shape[1] == 768


@pytest.mark.parametrize("max_new", [9, 191, 192, 193, 194, 321, 700])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_last_size_of_a_cache(heads, max_new):
  mock = Mock(np.random.default_rng(0).integers(1, 6, (2, 2048)), 13, 5)
  state = start(mock, [[1] * 64] * 2, heads=heads, max_new=max_new)
  # An accepted draft may spare the last window: none is accepted.
  state = loop.finish(mock, accept.Forced(0), state)
  last = decode.last_size(64 + max_new, tree_lib.chain(heads))
  assert mock.capacity(state.cache) == last


def test_lengths_share_programs():
  """Prompts of any length up to the next power of two, any max_new."""
  mock = Mock(np.full((2, 2048), 3), 13, 5)
  for jitted in (prompts_lib.read_jit, loop.begin_jit, loop.run_jit):
    jitted.clear_cache()
  for length, max_new in ((17, 40), (19, 41), (29, 31), (32, 57)):
    decode.generate(mock, [[1] * length, [2]], heads=3, max_new=max_new)
  for jitted in (prompts_lib.read_jit, loop.begin_jit, loop.run_jit):
    assert jitted._cache_size() == 1


@pytest.mark.slow
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
    if cache_len and len(prompt) + max_new + k - 1 > cache_len:
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
    ({"cache_len": 20}, "prompt 2 has 13 tokens; with 8 positions"),
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
  with pytest.raises(ValueError, match="16 tokens.* need 24 .*cache_len=23"):
    start(mock, PROMPTS, cache_len=23, heads=2, max_new=7)


@pytest.mark.slow
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
def test_whole_texts_have_head_1s_distribution(tree, drawn):
  """The loop draws, counts what the text holds, and keys its passes apart."""
  sampler = sampling.Sampler(temperature=0.9, penalty=1.7)
  rows, new, first = 60_000, 4, 1
  got = decode.generate(
    Tables(np.zeros((rows, 1), int), 3, 3),
    np.full((rows, 1), first),
    heads=tree,
    max_new=new,
    rule=accept.SpeculativeSampling(sampler, drawn),
    seed=1,
  )
  assert got.tokens_per_forward > 1.3  # drafts are accepted
  distribution = np.zeros((3,) * new)
  for text in np.ndindex(distribution.shape):
    chance, seen, last = 1.0, np.arange(3) == first, first
    for token in text:
      chance *= float(sampler.probabilities(TABLES[0, last], seen)[token])
      seen, last = seen | (np.arange(3) == token), token
    distribution[text] = chance
  counts = np.zeros(distribution.shape)
  np.add.at(counts, tuple(np.stack(got.tokens).T), 1)
  assert distribution.sum() == pytest.approx(1)
  found = stats.chisquare(
    counts.ravel(), rows * distribution.ravel() / distribution.sum()
  )
  assert found.pvalue > 1e-3


@pytest.mark.parametrize(
  "tree",
  [
    tree_lib.chain(3),
    tree_lib.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]]),
  ],
  ids=["chain", "tree"],
)
@pytest.mark.parametrize("kind", config.HEAD_KINDS)
def test_the_loop_updates_its_cache_in_place(kind, tree):
  """Temp memory of the compiled loop below a tenth of its cache."""
  heads = parameters.model_config(kind).head_layers
  cfg = parameters.model_config(
    kind, width=192, layers=5 + heads, attn_heads=3, kv_heads=3
  )
  key = jax.random.key(0)
  decoder = jax.eval_shape(lambda: layout.lay_out(model.Model(cfg, key)))
  rule = accept.Greedy()
  settings = interface.check_settings(
    decoder, heads=tree, max_new=3980, rule=rule
  )
  state = loop.abstract_state(decoder, settings, batch=3, cache_len=4000)
  compiled = loop.run_jit.lower(decoder, rule, state).compile()
  memory = compiled.memory_analysis()
  cache = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.cache))
  print(f"{kind}: temp / cache {memory.temp_size_in_bytes / cache:.3f}")
  assert memory.temp_size_in_bytes < 0.1 * cache
  assert memory.alias_size_in_bytes > cache  # the state's buffers are donated


@pytest.mark.parametrize("window", [0, 200])
def test_ordinary_decoding_of_one_row_copies_no_cache(window):
  """The compiler took the single row's update for a part of each product."""
  cfg = parameters.model_config(n_future=1, layers=3, sliding_window=window)
  net = jax.eval_shape(lambda: model.Model(cfg, jax.random.key(0)))
  decoder = jax.eval_shape(layout.lay_out, net)
  rule = accept.Greedy()
  settings = interface.check_settings(decoder, heads=1, max_new=9, rule=rule)
  state = loop.abstract_state(decoder, settings, batch=1, cache_len=999)
  program = loop.run_jit.lower(decoder, rule, state).compile().as_text()
  shape = ",".join(map(str, state.cache[0][0].shape))
  assert f"f32[{shape}]" in program
  assert not re.findall(rf"copy\S* = f32\[{shape}\]", program)


@pytest.mark.skipif(
  not re.search("amx_bf16|avx512_bf16", CPU),
  reason="a processor without products in bfloat16",
)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_in_bfloat16_converts_no_weight_and_no_cache(batch, heads):
  """The compiler has no kernel for a product of one row or with rounded sums,
  nor for access to single rows: it would convert the whole array."""
  cfg = parameters.model_config(
    n_future=2, layers=3, vocab=4999, dtype="bfloat16"
  )
  net = jax.eval_shape(lambda: model.Model(cfg, jax.random.key(0)))
  decoder = jax.eval_shape(layout.lay_out, net)
  rule = accept.Greedy()
  settings = interface.check_settings(
    decoder, heads=heads, max_new=9, rule=rule
  )
  state = loop.abstract_state(decoder, settings, batch=batch, cache_len=999)
  program = loop.run_jit.lower(decoder, rule, state).compile().as_text()
  converted = re.findall(r"= \w+\[([\d,]+)\]\S* convert\(", program)
  sizes = {math.prod(map(int, shape.split(","))) for shape in converted}
  smallest = min(a.size for a in jax.tree.leaves(decoder) if a.ndim > 1)
  assert sizes and max(sizes) < smallest < state.cache[0][0].size
