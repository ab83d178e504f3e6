"""The demo's sampled texts: the same for any number of heads, and samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from experiments.demo import figures, noise, tables
from mtp_jax import tokenizer
from mtp_jax.decode import tree as tree_lib
from tests import parameters

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
NEW = 11


@pytest.fixture(scope="module")
def net():
  return parameters.random_model("unembedding", n_future=3)


@pytest.fixture(scope="module")
def decoders(net):
  decoder = mtp_jax.lay_out(net, 31)
  return noise.decoders(decoder, len(PROMPTS), size=64, temperature=0.9)


@jax.jit
def forward(net, tokens):
  return net(tokens)


def one_by_one(net, prompt, added):
  """The text of the formula: the whole prefix is read for every token."""
  text = list(prompt)
  for _ in range(NEW):
    window = np.zeros((1, 5 + NEW), np.int32)  # one shape: compiled once
    window[0, : len(text)] = text
    logits = np.asarray(forward(net, window))[0, 0, len(text) - 1]
    text.append(int(np.argmax(logits + np.asarray(added)[len(text)])))
  return text[len(prompt) :]


def test_any_heads_and_trees_write_the_text_of_the_formula(net, decoders):
  wanted = [
    one_by_one(net, prompt, decoder.noise)
    for prompt, decoder in zip(PROMPTS, decoders, strict=True)
  ]
  tree = tree_lib.Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
  for heads in (1, 3, tree):
    for decoder, prompt, text in zip(decoders, PROMPTS, wanted, strict=True):
      found = mtp_jax.generate(decoder, [prompt], heads=heads, max_new=NEW)
      assert found.tokens[0].tolist() == text
  assert one_by_one(net, PROMPTS[0], np.zeros((64, 1))) != wanted[0]


def test_a_draft_has_the_noise_of_its_position(decoders):
  """Otherwise drafts would be rejected, though no text would change."""

  @jax.jit
  def added(noisy, token):
    window = noisy.forward(noisy.empty_cache(1, 32, 3), token, jnp.array([7]))
    logits, _ = noisy.draft(window, 3, token)
    return (logits - noisy.decoder.draft(window, 3, token)[0])[0]

  found = added(decoders[0], jnp.array([[2]]))
  np.testing.assert_allclose(found, decoders[0].noise[9:11], atol=1e-5)


def test_the_noise_samples_at_the_temperature():
  temperature, logits = 0.5, np.array([0.0, 0.4, -1.0, 0.9])
  decoder = type("Decoder", (), {"vocab": len(logits)})
  (found,) = noise.decoders(decoder, 1, size=20_000, temperature=temperature)
  best = np.argmax(logits + np.asarray(found.noise), -1)
  share = np.bincount(best, minlength=len(logits)) / len(best)
  expected = np.asarray(jax.nn.softmax(logits / temperature))
  # 5 standard deviations of a share of 20,000 draws are below 0.018.
  np.testing.assert_allclose(share, expected, atol=0.018)


def test_texts_that_part_are_told_with_their_margin(decoders):
  entries = figures.decode(
    decoders,
    type("Codec", (), {"eos": 30}),
    PROMPTS,
    heads=3,
    new=NEW,
    repeats=1,
  )
  assert [e["heads"] for e in entries] == [1, 2, 3]
  assert [e["differences"] for e in entries] == [[]] * 3
  results = [
    mtp_jax.generate(d, [p], heads=1, max_new=NEW)
    for d, p in zip(decoders, [PROMPTS[0], PROMPTS[0]], strict=True)
  ]
  (part,) = figures.differences(results[:1], results[1:])
  a, b = (r.texts[0] for r in results)
  place = int(np.argmax(a.tokens != b.tokens))
  assert part == {"prompt": 0, "token": place, "margin": a.margin[place]}


def test_control_characters_of_a_text_reach_no_terminal(capsys):
  entry = {
    **{"heads": 1, "tokens": [[27, 99]], "per_pass": [[1, 1]]},
    **{"accepted": [1.0], "tokens_per_forward": 1.0, "speedup": 1.0},
    **{"tokens_per_second": 1.0, "differences": []},
  }
  scores = {"bits_per_byte": [1.0], "accuracy": [1.0]}
  result = {
    **{"decoding": [entry], "prompts": [[155, 98]], "temperature": 0.0},
    **{"scores": scores | {"predicted_tokens_per_forward": 1.0}},
    **{"most_repeats": {1: 1, 2: 1, 3: 1}, "seconds": 1},
  }
  tables.show(result, tokenizer.Bytes())
  said = capsys.readouterr().out
  assert "\\x1bc" in said and "\x1b" not in said
