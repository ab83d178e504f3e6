"""Models write ordinary greedy decoding's text, whatever drafts."""

import dataclasses
import functools
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax import config, loss, tokenizer
from mtp_jax.data import batch as batch_lib
from mtp_jax.decode import accept, cache, layout, sampling
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import generate as decode
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib
from tests import parameters

# Two float32 evaluations of a logit at different widths differ by less than
# half of this (measured and asserted below). Where the best two are closer,
# either may win.
EPSILON = 3e-5


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


@pytest.fixture(scope="module")
def trained():
  """A byte model after some seconds on a module of the standard library."""
  codec = tokenizer.Bytes()
  text = codec.encode(pathlib.Path(textwrap.__file__).read_bytes())
  rng, N, T = np.random.default_rng(0), 3, 64
  shape = {"vocab": codec.vocab, "width": 32, "mlp": 88, "layers": 4}
  net = parameters.random_model(
    **shape, attn_heads=4, kv_heads=2, n_future=N, deviation=0.15
  )
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
    layout.lay_out(net), prompts, heads=1, max_new=MAX_NEW, cache_len=CACHE
  ).tokens
  return Ties(net, prompts, texts, len(prompts))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3])
def test_trained_model_at_batches_of_one_to_seven(trained, ordinary, k):
  net, prompts = trained
  decoder = layout.lay_out(net)
  same_width = greedy(decoder, prompts, k, MAX_NEW)
  for size in range(1, 8):
    run = functools.partial(
      decode.generate,
      decoder,
      prompts[:size],
      heads=k,
      max_new=MAX_NEW,
      cache_len=CACHE,
    )
    got = run()
    assert [t.tolist() for t in got.tokens] == same_width[:size]
    for row, text in enumerate(got.tokens):
      ordinary.check(row, text.tolist())
    stop = ord(" ")
    texts = run(stop=stop).tokens
    for text, want in zip(texts, same_width[:size], strict=True):
      assert text.tolist() == cut(want, stop)
  ordinary.report(f"trained, k={k}")
  print(f"{got.tokens_per_forward:.3f} tokens per forward at batch 7")
  if k > 1:
    assert 1.1 < got.tokens_per_forward < k - 0.1
    assert len({len(counts) for counts in got.per_pass}) > 1


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(trained, ordinary):
  net, prompts = trained
  decoder = layout.lay_out(net)
  for row, prompt in enumerate(prompts):
    alone = decode.generate(
      decoder, [prompt], heads=3, max_new=MAX_NEW, cache_len=CACHE
    )
    ordinary.check(row, alone.tokens[0].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["greedy", "drawn"])
def test_log_probabilities_and_margins_are_head_1s(trained, ordinary, rule):
  """Of every token written, by a chain or a tree, as the uncached model has."""
  net, prompts = trained
  decoder = layout.lay_out(net)
  sampler = sampling.Sampler(temperature=0.7, top_k=40)
  rule = (
    accept.GREEDY if rule == "greedy" else accept.SpeculativeSampling(sampler)
  )
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


@pytest.mark.slow
@pytest.mark.parametrize(
  "settings, epsilon",
  [
    ({}, EPSILON),
    ({"draft_dtype": "int8"}, EPSILON),
    ({"sliding_window": 8}, EPSILON),
    ({"few_drafts": range(97, 117)}, EPSILON),
    # Where a key rounds the other way, logits are off by a step of the cache.
    ({"cache_dtype": "bfloat16"}, 0.05),
    ({"cache_dtype": "int8"}, 0.05),
  ],
  ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_tree_writes_ordinary_decodings_text(trained, settings, epsilon):
  """With second and third choices accepted, on caches of every kind."""
  net, prompts = trained
  few = settings.get("few_drafts")
  settings = {k: v for k, v in settings.items() if k != "few_drafts"}
  decoder = layout.lay_out(net, **settings)
  if few:
    decoder = layout.limit_drafts(decoder, few)
  run = functools.partial(decode.generate, decoder, prompts, max_new=MAX_NEW)
  want, got = run(heads=1), run(heads=TREE3)
  for a, b in zip(want.texts, got.texts, strict=True):
    differ = np.flatnonzero(a.tokens != b.tokens)
    assert not differ.size or a.margin[differ[0]] < epsilon
  nodes = sum(t.nodes for t in got.texts)
  others = np.setdiff1d(np.arange(TREE3.size), TREE3.greedy_path)
  assert nodes[others].sum() > 5
  assert got.tokens_per_forward > run(heads=3).tokens_per_forward


@pytest.mark.slow
def test_a_ring_grows_until_it_is_whole(trained, monkeypatch):
  net, prompts = trained
  monkeypatch.setattr(window_lib, "CHUNK", 16)
  monkeypatch.setattr(cache, "ladder", lambda needed: -(-needed // 16) * 16)
  decoder = layout.lay_out(net, sliding_window=41)
  run = functools.partial(decode.generate, decoder, prompts, max_new=150)
  assert decoder.capacity(decoder.empty_cache(1, 56, 1)) == 56
  assert decoder.capacity(decoder.empty_cache(1, 99, 1)) is None
  want = run(heads=3)
  monkeypatch.setattr(cache, "ladder", lambda needed: 999)  # at once
  for a, b in zip(want.texts, run(heads=3).texts, strict=True):
    differ = np.flatnonzero(a.tokens != b.tokens)
    assert not differ.size or a.margin[differ[0]] < EPSILON


@pytest.mark.slow
def test_logits_of_two_widths_stay_within_epsilon(trained, ordinary):
  """What EPSILON stands on: the error of a logit is below half of it."""
  net, prompts = trained
  decoder = layout.lay_out(net)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rigged(decoder_lib.Transformer):
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
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(0, 31, n).tolist() for n in rng.integers(1, 17, 208)]
  net = parameters.random_model(
    kind, seed=seed, deviation=0.3, layers=1 + blocks, n_future=4
  )
  return net, prompts


@functools.cache
def plain(kind, seed):
  """(model, prompts, judge of their ordinary texts)."""
  net, prompts = random_model(kind, seed)
  texts = decode.generate(
    layout.lay_out(net), prompts, heads=1, max_new=64
  ).tokens
  return net, prompts, Ties(net, prompts, texts, len(prompts))


@pytest.mark.parametrize("kind", config.HEAD_KINDS)
def test_random_models_lose_nothing(kind):
  """208 prompts of 64 tokens each, every k, all tokens equal."""
  net, prompts, want = plain(kind, 0)
  decoder = layout.lay_out(net)
  for k in (2, 3, 4) if kind == "parallel" else (3,):
    got = decode.generate(decoder, prompts, heads=k, max_new=64)
    for row, text in enumerate(got.tokens):
      want.check(row, text.tolist())
    print(f"{got.tokens_per_forward:.3f} tokens per forward, k={k}")
  want.report(f"random, {kind}")


@pytest.mark.parametrize("seed", [0, 1])
def test_heads_that_always_or_never_agree_lose_nothing(seed):
  net, prompts, want = plain("parallel", seed)
  texts = np.zeros((len(prompts), 16 + 64 + 4), np.int32)
  for row, p, t in zip(texts, prompts, want.texts, strict=True):
    row[: len(p) + len(t)] = [*p, *t]
  for count in (1, 4):
    decoder = layout.lay_out(net)
    rigged = Rigged(**vars(decoder), texts=texts, wanted=np.int32(count))
    got = decode.generate(rigged, prompts, heads=4, max_new=64)
    for row, text in enumerate(got.tokens):
      want.check(row, text.tolist())
    if not want.flips:  # 63 = 15 passes of 4 tokens and one of 3
      assert set(got.passes) == {63 if count == 1 else 16}
  want.report(f"rigged, seed {seed}")
