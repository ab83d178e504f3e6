"""Log-likelihoods against whole forward passes, and against transformers."""

import os
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mtp_jax
from mtp_jax import tokenizer
from mtp_jax.decode import layout
from mtp_jax.decode import window as window_lib
from mtp_jax.evaluate import likelihood
from mtp_jax.interchange import hugging_face
from tests import parameters, transformers_reference

DRAW = np.random.default_rng(0)


def ids(count):
  return DRAW.integers(0, 31, count).tolist()


def whole_passes(net, items, length):
  """(sum of log-probabilities, greedy) of items: all logits at once."""
  tokens = np.zeros((len(items), length), np.int32)
  for row, item in enumerate(items):
    both = [*item.context, *item.continuation]
    tokens[row, : len(both)] = both
  scores = jax.device_get(jax.nn.log_softmax(jax.jit(net)(tokens)[0]))
  for row, (context, continuation) in enumerate(items):
    places = np.arange(len(continuation)) + len(context) - 1
    rows = scores[row][places]
    greedy = rows.argmax(-1) == continuation
    own = rows[np.arange(len(continuation)), continuation]
    yield own.sum(), greedy.all()


def test_equals_whole_passes(monkeypatch):
  """Contexts of many items, and alone; tails of one window, and of three."""
  monkeypatch.setattr(window_lib, "CHUNK", 8)
  monkeypatch.setattr(likelihood, "_BLOCK", 4)
  net = parameters.random_model(n_future=2, layers=3)
  decoder = layout.lay_out(net)
  choices, examples = [ids(6), ids(11), ids(3)], ids(9)
  apart = [likelihood.Item(choices[i % 3], ids(1 + i)) for i in range(9)]
  apart.append(likelihood.Item(ids(1), ids(23)))
  alike = [
    likelihood.Item([*examples, *ids(i % 4)], ids(1 + i % 3)) for i in range(6)
  ]
  # The likeliest continuations, so that some are greedy.
  best = jax.jit(net)(np.array([choices[0]]))[0, 0, -1].argmax()
  apart.append(likelihood.Item(choices[0], [int(best)]))
  found = likelihood.score(decoder, apart, rows=4)
  found += likelihood.score(decoder, alike, rows=4)
  for got, want in zip(
    found, whole_passes(net, apart + alike, 24), strict=True
  ):
    np.testing.assert_allclose(got.logprob, want[0], rtol=1e-5)  # float32
    assert got.greedy == want[1]
  assert {got.greedy for got in found} == {True, False}
  shared = [
    likelihood._shared([likelihood.Item(*map(tuple, item)) for item in items])
    for items in (apart, alike)
  ]
  assert sorted(map(len, shared[0].values())) == [1, 3, 3, 4]
  assert list(shared[1]) == [tuple(examples)]  # read once for all


def test_shared_contexts_are_read_once(monkeypatch):
  net = parameters.random_model(n_future=1, layers=2)
  decoder, read = layout.lay_out(net), []
  real = likelihood.prompts_lib.read_jit

  def counting(decoder, tokens, lengths, **settings):
    read.extend(lengths.tolist())
    return real(decoder, tokens, lengths, **settings)

  monkeypatch.setattr(likelihood.prompts_lib, "read_jit", counting)
  context = ids(12)
  items = [likelihood.Item(context, ids(2)) for _ in range(5)]
  likelihood.score(decoder, items, rows=2)
  assert sorted(read) == [1, 12]  # and a row of padding


@given(st.integers(0, 40), st.integers(1, 9))
def test_windows_predict_each_token_once(size, length):
  text = list(range(100, 100 + size))
  found = list(likelihood.windows(text, 7, length))
  assert [t for item in found for t in item.continuation] == text
  whole = [7, *text]
  for number, item in enumerate(found):
    both = [*item.context, *item.continuation]
    end = item.continuation[-1] - 99  # its place in `whole`
    assert both == whole[end + 1 - len(both) : end + 1]
    # It reads all but the last token: as many as it may, but for a short text.
    assert len(both) - 1 == (min(size, length) if number == 0 else length)


def test_rolling_adds_windows_up(monkeypatch):
  def score(decoder, items, rows):
    return [likelihood.Score(-len(item.continuation), True) for item in items]

  monkeypatch.setattr(likelihood, "score", score)
  found = likelihood.rolling(None, [ids(7), [], ids(3)], prefix=1, length=3)
  assert found == [-7, 0, -3]


def test_equals_transformers(tmp_path):
  """Texts that transformers writes, with their log-probabilities."""
  want = transformers_reference.reference("llama")
  transformers_reference.write("llama", tmp_path)
  net = hugging_face.load(tmp_path, hugging_face.settings(tmp_path))
  window = transformers_reference.window()
  items = [
    likelihood.Item(window[:length], tokens)
    for length, tokens in zip(
      transformers_reference.PROMPTS, want["tokens"], strict=True
    )
  ]
  found = likelihood.score(layout.lay_out(net), items, rows=2)
  sums = [np.sum(logprob) for logprob in want["logprob"]]
  np.testing.assert_allclose([f.logprob for f in found], sums, rtol=1e-5)
  assert all(f.greedy for f in found)


SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(
  not (SMOLLM2 and transformers_reference.has_transformers()),
  reason="needs torch, and SMOLLM2=FOLDER of SmolLM2-135M-Instruct",
)
def test_equals_transformers_on_smollm2():
  """Choices after a question, by plain transformers in float32."""
  import torch
  import transformers

  folder = pathlib.Path(SMOLLM2)
  net, _, codec = mtp_jax.load(folder)
  question = "Question: What do plants take up from the soil?\nAnswer:"
  items = [
    likelihood.of_texts(codec, question, f" {text}")
    for text in ("water", "the light of the sun", "stones and iron", "music")
  ]
  items.append(likelihood.of_texts(codec, "", "Plants need water."))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  split = transformers.AutoTokenizer.from_pretrained(folder)
  found = likelihood.score(layout.lay_out(net, codec.vocab), items, rows=5)
  for got, (context, continuation) in zip(found, items, strict=True):
    both = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
      scores = theirs(both).logits[0].log_softmax(-1)
    places = torch.arange(len(continuation)) + len(context) - 1
    want = scores[places, torch.tensor(continuation)].sum().item()
    print(f"{got.logprob:.6f} {want:.6f}")
    np.testing.assert_allclose(got.logprob, want, rtol=1e-5)
  assert list(items[0].context) == split(question).input_ids


def test_texts_as_ids():
  codec = tokenizer.Bytes()
  bos = codec.bos
  for (context, continuation, length), want in (
    (("ab", "c", None), ([bos, 97, 98], [99])),
    (("ab \n", "c", None), ([bos, 97, 98], [32, 10, 99])),
    (("", "ab", None), ([bos], [97, 98])),
    ((" ", "a", None), ([bos], [32, 97])),
    (("abcd", "ef", 3), ([99, 100], [101, 102])),
    (("abcd", "ef", 2), ([100], [101, 102])),
  ):
    found = likelihood.of_texts(codec, context, continuation, length)
    assert tuple(found) == want


@pytest.mark.parametrize(
  "call, line",
  [
    (lambda d: likelihood.score(d, [([1], [])]), "continuation of item 0 is e"),
    (
      lambda d: likelihood.score(d, [([1], [2]), ([], [2])]),
      "context of item 1 is empty; give one token or more",
    ),
    (lambda d: likelihood.score(d, [([1], [31])]), "item 0: id 31 is outside"),
    (lambda d: likelihood.score(d, [], rows=0), "rows"),
    (
      lambda d: likelihood.of_texts(tokenizer.Bytes(), "a", ""),
      "the continuation '' has no token",
    ),
    (
      lambda d: likelihood.of_texts(tokenizer.Bytes(), "a", "abc", 2),
      "'abc' has 3 tokens, more than the 2 that the model reads",
    ),
  ],
)
def test_what_is_refused(call, line):
  decoder = layout.lay_out(parameters.random_model(n_future=1, layers=2))
  with pytest.raises(ValueError, match=line):
    call(decoder)
  assert likelihood.score(decoder, []) == []
