"""Held-out measures: the formula, and what the decoder then counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax import config, loss
from mtp_jax.data import batch as batch_lib
from mtp_jax.decode import generate, layout
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.model import model, surgery
from tests import parameters


def make(head="parallel", n_future=3):
  return parameters.random_model(
    head, vocab=29, layers=n_future + 1, n_future=n_future
  )


def make_batch(n_future, rows=5, length=23, weight=None):
  tokens = jax.random.randint(
    jax.random.key(2), (rows, length + n_future), 0, 29
  )
  ends = np.random.default_rng(0).random((rows, length + n_future)) < 0.1
  segments = 1 + np.cumsum(ends, 1).astype(np.int32)
  segments[0, -7:] = 0  # past the end of the data
  return batch_lib.of(tokens, segments, weight)


all_logits = jax.jit(lambda net, *batch: net(*batch))


def slowly(net, batch):
  """The same measures, position by position, in float64."""
  N = net.cfg.n_future
  tokens, segments = np.asarray(batch.tokens), batch.segments
  weight = np.float64(batch.weight)
  B, T = tokens.shape[0], tokens.shape[1] - N
  logits = np.float64(all_logits(net, tokens[:, :T], segments[:, :T]))
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  nats, hits, targets = np.zeros((3, N))
  walks = {"greedy": [0.0, 0.0], "sampled": [0.0, 0.0]}
  for b in range(B):
    mass = {name: np.zeros(T + N + 1) for name in walks}
    for t in range(T):
      here = segments[b, t]
      for i in range(N):
        if here and segments[b, t + 1 + i] == here:
          x, w = tokens[b, t + 1 + i], weight[b, t + 1 + i]
          nats[i] -= w * np.log(p[i, b, t, x])
          hits[i] += w * (logits[i, b, t].argmax() == x)
          targets[i] += w
      next_counts = weight[b, t + 1] > 0
      for name in walks:
        prompt_ends = next_counts and weight[b, t] == 0
        if t == 0 or here != segments[b, t - 1] or prompt_ends:
          mass[name][t] = 1.0
        reach, steps = 1.0, []
        for i in range(1, N):
          inside = here and segments[b, t + 1 + i] == here and t + i < T
          inside = inside and next_counts and weight[b, t + 1 + i] > 0
          if name == "greedy":
            agrees = inside and (
              logits[i, b, t].argmax() == logits[0, b, t + i].argmax()
            )
          else:
            agrees = (
              np.minimum(p[i, b, t], p[0, b, t + i]).sum() if inside else 0
            )
          steps.append(reach * (1 - agrees))
          reach *= agrees
        steps.append(reach)
        for j, chance in enumerate(steps):
          mass[name][t + 1 + j] += mass[name][t] * chance
        inside = here and segments[b, t + 1] == here and next_counts
        if t <= T - N and inside:
          m = mass[name][t]
          walks[name] = [
            walks[name][0] + m,
            walks[name][1] + m * sum((j + 1) * c for j, c in enumerate(steps)),
          ]
  return {
    "nats": nats / np.maximum(targets, 1e-9),
    "accuracy": hits / np.maximum(targets, 1e-9),
    **{
      name: written / max(passes, 1e-9)
      for name, (passes, written) in walks.items()
    },
  }


KINDS = [(head, 4) for head in config.HEAD_KINDS] + [("parallel", 64)]


@pytest.mark.parametrize("head, block", KINDS)
def test_equals_the_slow_way(head, block):
  net, batch = make(head), make_batch(3)
  got = head_measures.measure(net, [batch], block=block)
  want = slowly(net, batch)
  assert 1 < want["greedy"] < want["sampled"] < 3
  for name, value in want.items():
    # Sums of some hundred float32 terms against float64.
    np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)


def weights():
  """Weights of a batch's tokens by what is special about them."""
  ones = np.ones((5, 26), np.float32)
  prompts, row = ones.copy(), ones.copy()
  prompts[:, :9] = prompts[1, 12:14] = prompts[3, 15] = row[2] = 0
  return {
    "prompts, and 0 in the middle of a document": prompts,
    "0 in a row": row,
    "0 in the batch": 0 * ones,
    "fractions": np.random.default_rng(1).random(ones.shape, np.float32),
  }


@pytest.mark.parametrize("name", weights())
def test_weights(name):
  net, batch = make(), make_batch(3, weight=weights()[name])
  got, want = head_measures.measure(net, [batch], block=4), slowly(net, batch)
  for measure, value in want.items():
    np.testing.assert_allclose(got[measure], value, rtol=2e-5, err_msg=measure)
  assert (want["sampled"] > 1) == batch.weight.any()


def test_batches_are_averaged_by_their_weights():
  net = make()
  weight = np.random.default_rng(2).random((5, 26), np.float32)
  whole = make_batch(3, rows=5, weight=weight)
  parts = [jax.tree.map(lambda x: x[:2], whole)]
  parts.append(jax.tree.map(lambda x: x[2:], whole))
  a, b = (
    head_measures.measure(net, [whole]),
    head_measures.measure(net, iter(parts)),
  )
  for name in a:
    # The same terms added in another order.
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)


def test_one_head_writes_one_token_per_pass():
  got = head_measures.measure(make(n_future=1), [make_batch(1)])
  assert got["greedy"] == got["sampled"] == 1


def learn(net, text, steps):
  """A model that knows a text well enough to agree with itself at times."""
  N, tx = net.cfg.n_future, optax.adam(1e-2)
  windows = batch_lib.of(jnp.asarray(text)[None])
  targets = loss.future_targets(windows, N)
  scale = jnp.full((N,), 1 / windows.tokens.size)

  @jax.jit
  def fit(net):
    def one(carry, _):
      net, opt = carry
      grads = jax.grad(
        lambda net: loss.token_loss(net, windows, targets, scale)[0]
      )(net)
      updates, opt = tx.update(grads, opt)
      return (optax.apply_updates(net, updates), opt), None

    return jax.lax.scan(one, (net, tx.init(net)), None, steps)[0][0]

  return fit(net)


@pytest.mark.parametrize("head", ["parallel", "unembedding"])
def test_predicts_what_the_decoder_counts(head):
  """On the model's own text the walk is the decoder's, pass for pass."""
  text = np.random.default_rng(0).integers(0, 29, 9).tolist() * 7
  net, new = learn(make(head, n_future=4), text, 25), 90
  prompt = text[:5]
  result = generate.generate(
    layout.lay_out(net), [prompt], heads=4, max_new=new
  )
  own = np.array([*prompt, *result.tokens[0]])
  sources = len(prompt) - 1 + np.cumsum([0, *result.per_pass[0]])[:-1]
  tokens = np.concatenate([own, np.zeros(4, int)])[None].astype(np.int32)
  segments = np.where(np.arange(tokens.shape[1]) < len(own), 1, 0)[None]
  hits = agreements(net, tokens, segments)
  fresh = np.arange(len(own)) == len(prompt) - 1
  counts = np.isin(np.arange(len(own)), sources[:-1])  # the last is cut short
  passes, written = head_measures.expected_passes(
    hits, fresh[None], counts[None]
  )
  assert float(passes) == len(sources) - 1
  assert float(written) == result.per_pass[0][:-1].sum()
  assert len(set(result.per_pass[0])) > 1  # neither always nor never accepted


def agreements(net, tokens, segments):
  N, T = net.cfg.n_future, tokens.shape[1] - net.cfg.n_future
  best = all_logits(net, tokens[:, :T], segments[:, :T]).argmax(-1)
  best = np.asarray(best)
  hits = np.zeros((N - 1, 1, T))
  for i in range(1, N):
    hits[i - 1, :, : T - i] = best[i, :, : T - i] == best[0, :, i:]
  return jnp.asarray(hits)


def test_tokens_per_forward_with_fewer_heads():
  """As of the model without the others, on windows with as many positions."""
  net = make("unembedding", 4)
  batches = [make_batch(4), make_batch(4, weight=weights_of(4))]
  found = head_measures.tokens_per_forward(net, batches, (1, 2, 4), block=7)
  assert found[1] == 1 < found[2] <= 2
  for k in (2, 4):
    fewer = [
      jax.tree.map(lambda a, k=k: a[:, : a.shape[1] - 4 + k], batch)
      for batch in batches
    ]
    wanted = head_measures.measure(surgery.drop_heads(net, k), fewer, block=7)
    np.testing.assert_allclose(found[k], wanted["greedy"], rtol=1e-6)
  with pytest.raises(ValueError, match=r"k=5 is outside 1\.\.4"):
    head_measures.tokens_per_forward(net, batches, (5,))
  with pytest.raises(ValueError, match="no batch"):
    head_measures.tokens_per_forward(net, [], (2,))


def weights_of(n_future):
  weight = np.ones((5, 23 + n_future), np.float32)
  weight[:, :9] = 0
  return weight


def test_errors_name_the_numbers():
  with pytest.raises(ValueError, match="no batch"):
    head_measures.measure(make(), [])
  with pytest.raises(ValueError, match="at least 3 tokens for 3 heads, not 2"):
    head_measures.measure(make(), [make_batch(3, length=2)])


def temp(n_future):
  """Temporary bytes of a compiled `score`."""
  cfg = config.Model(
    vocab=4001, width=64, mlp=96, layers=n_future + 1, attn_heads=2,
    kv_heads=1, n_future=n_future,
  )  # fmt: skip
  net = jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))
  windows = batch_lib.abstract(2, 256 + n_future)
  lowered = head_measures.score.lower(net, windows, block=8)
  options = {"xla_backend_optimization_level": 0}
  compiled = lowered.compile(compiler_options=options)
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_a_block_of_one_heads_logits():
  states, logits = (4 * 2 * 256 * width for width in (64, 4001))
  assert temp(5) < 0.5 * logits  # of one head, [B, T, V]
  assert temp(9) - temp(5) < 0.5 * states  # of one more head, [B, T, D]
