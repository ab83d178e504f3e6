"""The server: same texts, no idle rows, prompts read once."""

import heapq

import jax
import numpy as np
import pytest

from mtp_jax.decode import (
  accept,
  autotune,
  interface,
  layout,
  loop,
  sampling,
  serve,
)
from mtp_jax.decode import generate as decode
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib
from tests import parameters
from tests.mocks import TREE, Broken, Mock, mock_text

SIZES = (5, 1, 13, 29, 2, 17, 3, 3, 11, 16, 7)
PROMPTS = [np.random.default_rng(n).integers(0, 13, n).tolist() for n in SIZES]
STOP, MAX_NEW = 4, 23


@pytest.fixture
def mock():
  """Every row drafts alike: which row a text is in must not matter."""
  return Mock(np.broadcast_to(np.arange(79) % 5 + 1, (1, 79)), 13, 5)


def check_same(got, want):
  for a, b in zip(got.texts, want.texts, strict=True):
    jax.tree.map(np.testing.assert_array_equal, vars(a), vars(b))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("heads", [3, TREE], ids=["chain", "tree"])
def test_equals_one_batch(mock, rows, heads):
  found = []
  settings = {"heads": heads, "max_new": MAX_NEW, "stop": STOP}
  got = serve.generate_all(
    mock,
    PROMPTS,
    rows=rows,
    on_text=lambda i, text: found.append((i, text)),
    **settings,
  )
  check_same(got, decode.generate(mock, PROMPTS, **settings))
  for prompt, text in zip(PROMPTS, got.tokens, strict=True):
    assert text.tolist() == mock_text(prompt, 13, MAX_NEW, STOP)
  assert sorted(i for i, _ in found) == list(range(len(PROMPTS)))
  assert all(text is got.texts[i] for i, text in found)


def test_another_generator_of_random_numbers(mock):
  """Whose keys have four numbers, not two."""
  settings = {"heads": 3, "max_new": MAX_NEW, "stop": STOP}
  want = serve.generate_all(mock, PROMPTS, rows=2, **settings)
  with jax.default_prng_impl("rbg"):
    check_same(serve.generate_all(mock, PROMPTS, rows=2, **settings), want)
    checked = interface.check_settings(mock, **settings)
    state = loop.abstract_state(mock, checked, batch=3, cache_len=99)
  assert state.key.shape == (3, 4)


def test_no_row_waits_while_a_prompt_does(monkeypatch):
  """The device takes no more passes than rows refilled at once would."""
  turns = []

  class Counting(Mock):
    def forward(self, cache, tokens, start, *, tree=None, valid=None):
      if valid is None:
        jax.debug.callback(lambda: turns.append(1))
      return super().forward(cache, tokens, start, tree=tree)

  jax.tree_util.register_dataclass(Counting, ["wanted"], ["vocab", "n_future"])
  mock = Counting(np.ones((1, 79), int), 13, 5)
  got = serve.generate_all(
    mock, PROMPTS, rows=3, heads=1, max_new=MAX_NEW, stop=STOP
  )
  jax.effects_barrier()
  assert len(set(got.passes)) > 3  # texts end at odds
  free = [0, 0, 0]
  for passes in got.passes:
    heapq.heappush(free, heapq.heappop(free) + int(passes))
  # A text whose first token ends it takes a turn to be noticed.
  short = sum(passes == 0 for passes in got.passes)
  assert max(free) <= len(turns) <= max(free) + short


@pytest.mark.parametrize("long", [False, True])
def test_the_cache_grows_when_a_text_fills_it(monkeypatch, long):
  grown, grow = [], loop.grow

  def counted(decoder, state):
    grown.append(decoder.capacity(state.cache))
    return grow(decoder, state)

  monkeypatch.setattr(loop, "grow", counted)
  mock = Mock(np.broadcast_to(np.arange(900) % 5 + 1, (1, 900)), 13, 5)
  texts = [mock_text(p, 13, 600, STOP) for p in PROMPTS]
  some = [i for i, text in enumerate(texts) if long or len(text) < 400]
  prompts = [PROMPTS[i] for i in some]
  got = serve.generate_all(
    mock, prompts, rows=3, heads=4, max_new=600, stop=STOP
  )
  assert grown == [256, 384] * long  # for all texts, not for each
  assert [t.tolist() for t in got.tokens] == [texts[i] for i in some]
  assert len(some) > 3  # rows are refilled


def test_other_prompts_compile_nothing_new(mock):
  programs = prompts_lib.read_jit, serve._decode, serve._take

  def compiled(prompts):
    serve.generate_all(mock, prompts, rows=4, heads=3, max_new=MAX_NEW)
    return [program._cache_size() for program in programs]

  fills = serve._fill._cache_size()
  before = compiled(PROMPTS)  # of 1 to 29 tokens
  assert compiled([p[:19] for p in PROMPTS[::-1]] * 2) == before
  # Prompts padded to 16 and 32, of which 1, 2 or 4 come in at once.
  assert serve._fill._cache_size() - fills <= 2 * 3


@pytest.mark.slow
def test_samples_share_one_reading(mock, monkeypatch):
  read, calls = prompts_lib.read_jit, []

  def counted(decoder, tokens, lengths, **sizes):
    calls.append(len(tokens))
    return read(decoder, tokens, lengths, **sizes)

  monkeypatch.setattr(prompts_lib, "read_jit", counted)
  rule = accept.SpeculativeSampling(sampling.Sampler(temperature=3.0))
  settings = {"heads": 3, "max_new": 17, "rule": rule, "seed": 3}
  got = serve.generate_all(mock, PROMPTS[:3], rows=4, samples=5, **settings)
  assert sum(calls) == 3
  # Text i is what it is in any company: here, in one batch.
  repeated = [p for p in PROMPTS[:3] for _ in range(5)]
  want = decode.generate(mock, repeated, **settings)
  check_same(got, want)
  assert len({tuple(t) for t in got.tokens[:5]}) == 5
  other = serve.generate_all(
    mock, PROMPTS[:3], rows=7, samples=5, **(settings | {"seed": 4})
  )
  assert not np.array_equal(other.tokens[0], got.tokens[0])


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_text_ends_where_the_caller_says(mock, rows):
  """At the same token in any company, and its row takes the next text."""

  def end(place, tokens):
    """The first 5 at an even place, unless the prompt is the third."""
    even = np.flatnonzero(tokens[::2] == 5)
    return 2 * int(even[0]) + 1 if even.size and place != 2 else None

  got = serve.generate_all(
    mock, PROMPTS, rows=rows, heads=3, max_new=60, stop=STOP, end=end
  )
  ended = 0
  for place, (prompt, text) in enumerate(zip(PROMPTS, got.texts, strict=True)):
    whole = mock_text(prompt, 13, 60, STOP)
    kept = end(place, np.array(whole))
    ended += kept is not None
    assert text.tokens.tolist() == whole[:kept]
    assert text.per_pass.sum() == len(text.tokens) - 1 == len(text.margin) - 1
  assert 3 < ended < len(PROMPTS)


def test_an_ended_text_frees_its_row(monkeypatch):
  filled, fill = [], serve._fill
  monkeypatch.setattr(
    serve, "_fill", lambda *args: filled.append(1) or fill(*args)
  )
  endless = Mock(np.ones((1, 900), int), 13, 5)
  got = serve.generate_all(
    endless,
    PROMPTS[:4],
    rows=1,
    heads=1,
    max_new=700,
    end=lambda _, tokens: 3 if len(tokens) > 3 else None,
  )
  assert [len(t) for t in got.tokens] == [3] * 4 and len(filled) == 4
  assert max(got.passes) == 2


def test_what_is_drawn_depends_on_the_number_alone(mock):
  """So the missing texts can be drawn later."""
  rule = accept.SpeculativeSampling(sampling.Sampler(temperature=3.0))
  settings = {"heads": 3, "max_new": 17, "rule": rule, "seed": 3}
  prompts = PROMPTS[:3]
  whole = serve.generate_all(mock, prompts, rows=4, samples=4, **settings)
  some = [[7, 5], [2**31 - 1, 8, 10]]
  got = serve.generate_all(mock, prompts[1:], rows=2, samples=some, **settings)
  assert got.tokens[0].tolist() == whole.tokens[7].tolist()
  assert got.tokens[1].tolist() == whole.tokens[5].tolist()
  assert [got.tokens[i].tolist() for i in (3, 4)] == [
    whole.tokens[i].tolist() for i in (8, 10)
  ]


def test_auto_takes_what_choose_finds(mock, monkeypatch):
  asked = {}

  def chosen(decoder, prompts, **settings):
    asked.update(settings, prompts=len(prompts))
    return autotune.Option(TREE, 1.0, 1.0)

  monkeypatch.setattr(autotune, "choose", chosen)
  rule = accept.TopK(1)
  got = serve.generate_all(
    mock, PROMPTS, rows=3, heads="auto", max_new=9, rule=rule
  )
  assert got.tree == TREE
  assert asked["batch"] == asked["prompts"] == 3
  assert asked["rule"] is rule


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"rows": 0}, "rows=0"),
    ({"samples": 0}, "samples=0"),
    ({"samples": [[1], [2]]}, "the numbers of 2 prompts' texts; there are 11"),
    ({"samples": [[2**31]] * 11}, "the number 2147483648"),
    ({"heads": 6}, "heads=6 is outside 1..5"),
    ({"heads": "best"}, "heads='best': give a number, a tree or 'auto'"),
    ({"max_new": 0}, "max_new=0 writes nothing"),
    ({"prompts": []}, "no prompts"),
    ({"prompts": [[1], [2, 13]]}, "prompt 1 holds id 13"),
    ({"rule": accept.TopK(2, block=4)}, "block=4 is outside 1..2"),
  ],
)
def test_errors_name_the_value(mock, settings, words):
  settings = {
    "prompts": PROMPTS,
    "rows": 2,
    "heads": 2,
    "max_new": 5,
  } | settings
  with pytest.raises(ValueError, match=words):
    serve.generate_all(mock, **settings)


def test_a_row_that_is_not_finite_does_not_spoil_the_others():
  """Their texts are handed out; then the error names the one."""
  mock = Broken(np.broadcast_to(np.arange(79) % 5 + 1, (1, 79)), 13, 5)
  texts = [mock_text(p, 13, MAX_NEW, [7, 4]) for p in PROMPTS]
  good = {i for i, p in enumerate(PROMPTS) if p[0] != 9}
  found = {}
  with pytest.raises(ValueError, match="the logits of text 5 are not finite"):
    serve.generate_all(
      mock,
      PROMPTS,
      rows=2,
      heads=3,
      max_new=MAX_NEW,
      stop=[7, 4],
      on_text=found.__setitem__,
    )
  assert found.keys() == good and 0 < len(good) < len(PROMPTS)
  assert all(found[i].tokens.tolist() == texts[i] for i in good)


@pytest.mark.slow
def test_a_ring_serves_too():
  decoder = layout.lay_out(
    parameters.random_model(),
    sliding_window=8,
  )
  tree = tree_lib.from_paths([[0], [1], [0, 0]])
  prompts = [[t + 7 for t in p] for p in PROMPTS]
  settings = {"heads": tree, "max_new": 31}
  got = serve.generate_all(decoder, prompts, rows=3, **settings)
  want = decode.generate(decoder, prompts, **settings)
  for a, b in zip(got.texts, want.texts, strict=True):
    differ = np.flatnonzero(a.tokens != b.tokens)
    if differ.size:  # another batch size rounds differently
      assert b.margin[differ[0]] < 3e-5
