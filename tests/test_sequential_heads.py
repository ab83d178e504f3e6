"""Heads that read tokens: model, loss, training, evaluation, drafts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config, loss, sharding
from mtp_jax.data import batch
from mtp_jax.decode import generate as decode
from mtp_jax.decode import interface
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.model import heads, layers, model
from mtp_jax.train import evaluations, step
from tests import mocks, parameters, sequential_heads

B, T, D, V, N = 2, 11, 12, 19, 3


@pytest.fixture(scope="module", autouse=True)
def kinds():
  with sequential_heads.registered():
    yield


def settings(kind, **changes):
  fields = dict(
    vocab=V, width=D, mlp=17, layers=4, attn_heads=3, kv_heads=1, n_future=N
  )
  return config.Model(head=kind, **fields | changes)


@functools.cache
def filled(kind, **changes):
  cfg = settings(kind, **changes)
  return parameters.filled(lambda key: model.Model(cfg, key), 0.3)


@functools.cache
def windows():
  """Two documents a row, and weights of 0 in the middle of one."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (B, T + N)).astype(np.int32)
  segments = np.array([[1] * 5 + [2] * 9, [0] * 2 + [1] * 12], np.int32)
  weight = np.ones(tokens.shape, np.float32)
  weight[1, 6:8] = 0
  return batch.Batch(tokens, segments, weight)


@jax.jit
def forward(net, tokens, segments):
  return net(tokens, segments)


def distance(a, b):
  """Norm of the difference of two trees over the norm of the second."""
  a, b = (
    np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])
    for tree in (a, b)
  )
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", sequential_heads.KINDS)
def test_logits_against_a_loop_over_the_heads(kind):
  net, rows = filled(kind), windows()
  tokens, segments = rows.tokens[:, : T + N - 1], rows.segments
  logits = forward(net, tokens, segments[:, : T + N - 1])
  assert logits.shape == (N, B, T, V)
  ctx = layers.training_context(jnp.asarray(segments[:, :T]), net.cfg)
  z = jax.jit(lambda net: net.run_trunk(tokens[:, :T], ctx))(net)
  x, one = z, jax.jit(lambda layer, x, e: layer(layer.join(x, e), ctx))
  for i in range(N):
    read = net.embed[...][tokens[:, i : i + T]]
    x = one(net.heads.layer(i), z if kind == "reading" else x, read)
    hidden = net.heads.normalise(x)
    # float32 rounds to 6e-8; three layers on values of about 10.
    np.testing.assert_allclose(
      logits[i], hidden @ net.heads.unembed[...], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("kind", sequential_heads.KINDS)
def test_a_head_sees_up_to_the_token_before_its_target(kind):
  net, s = filled(kind), 6
  tokens = jnp.asarray(windows().tokens[:, : T + N - 1])
  other = tokens.at[:, s].set((tokens[:, s] + 1) % V)
  one = jnp.ones_like(tokens)
  change = forward(net, other, one) - forward(net, tokens, one)
  change = np.abs(change).max((1, 3))  # [N, T]
  for i in range(N):  # head i+1 at t reads tokens up to t+i
    np.testing.assert_array_equal(change[i, : s - i], 0)
    assert (change[i, s - i : s + 1] > 1e-3).all()


@functools.cache
def gradients(kind, name, dtype="float32", remat="none"):
  """((total, nll), gradients of the whole model)."""
  net = filled(kind, dtype=dtype, remat=remat)
  targets = loss.future_targets(windows(), N)
  how = loss.Settings(implementation=name, block=4)
  scale = jnp.asarray([0.7, 0.2, 0.05])

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def total(net):
    return loss.token_loss(net, windows(), targets, scale, how)

  return total(net)


@pytest.mark.parametrize("kind", sequential_heads.KINDS)
def test_the_formula_against_float64(kind):
  net, rows = filled(kind), windows()
  at = slice(0, T + N - 1)
  logits = forward(net, rows.tokens[:, at], rows.segments[:, at])
  logits = np.float64(logits)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  tokens, weight = loss.future_targets(rows, N)
  picked = np.take_along_axis(log_p, np.maximum(tokens, 0)[..., None], -1)
  wanted = -(picked[..., 0] * weight * (tokens >= 0)).sum((1, 2))
  (_, nll), _ = gradients(kind, "formula")
  np.testing.assert_allclose(nll, wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", sequential_heads.KINDS)
@pytest.mark.parametrize("name", ["serial", "checkpointed"])
def test_equals_the_formula(kind, name):
  """The formula's gradients are autodiff's; the embedding's is among them."""
  found, wanted = gradients(kind, name), gradients(kind, "formula")
  assert distance(found, wanted) <= 1e-6
  assert distance(found[1].embed, wanted[1].embed) <= 1e-6


def test_heads_give_the_embedding_a_gradient():
  """A token that no trunk position holds is read by the heads alone."""
  net, N_ = filled("sequential"), N
  tokens = np.full((1, T + N_), 3, np.int32)
  tokens[0, T] = 5
  rows = batch.of(tokens)
  targets = loss.future_targets(rows, N_)
  grads = jax.jit(
    jax.grad(lambda net: loss.token_loss(net, rows, targets, jnp.ones(N_))[0])
  )(net)
  moved = np.flatnonzero(np.abs(grads.embed[...]).max(1))
  assert moved.tolist() == [3, 5]


@pytest.mark.parametrize("kind", sequential_heads.KINDS)
def test_bfloat16_and_rematerialisation(kind):
  wanted = gradients(kind, "formula")
  remat = gradients(kind, "serial", remat="full")
  assert distance(remat, wanted) <= 1e-6
  # 8 bits, 2**-9 a rounding, some twenty of them.
  low = gradients(kind, "serial", dtype="bfloat16")
  assert distance(low[1], wanted[1]) < 0.05
  assert {g.dtype for g in jax.tree.leaves(low)} == {jnp.dtype("float32")}


def test_memory_does_not_grow_with_heads():
  """Per head, less than its logits: the embedding's gradient is one array."""
  B, T, V = 2, 64, 4001

  def temp(n):
    cfg = settings("reading", vocab=V, n_future=n, layers=2 + n)
    net = jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))

    def total(net, rows):
      how, scale = loss.Settings(block=8), jnp.ones(n)
      targets = loss.future_targets(rows, n)
      return loss.token_loss(net, rows, targets, scale, how)

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(
      net, batch.abstract(B, T + n)
    )
    held = compiled.compile().memory_analysis().temp_size_in_bytes
    own = sum(4 * a.size for a in jax.tree.leaves(net.heads.layers))
    return held - own  # the gradients of the heads' layers

  assert temp(4) - temp(1) < 0.05 * 4 * B * T * V


@pytest.mark.slow
@pytest.mark.parametrize("kind", sequential_heads.KINDS)
def test_a_training_step(kind):
  """In microbatches as in one, and on a batch learnt by heart."""
  cfg = config.Config(
    model=settings(kind),
    data=config.Data(seq_len=T, batch=B),
    optim=config.Optim(warmup=2, peak=1e-2),
    train=config.Train(steps=30, loss_block=4),
  ).check()
  mesh = sharding.make_mesh(config.Mesh(1, 1), jax.devices()[:1])
  losses = []
  for parts in (1, 2):
    cfg = cfg.replace(train={"accumulate": parts})
    state, run = step.init_state(cfg, mesh), step.compile_step(cfg, mesh)
    for _ in range(30):
      state, metrics = run(state, windows())
      losses.append(float(metrics["loss"]))
  # The same terms added in another order, then magnified by Adam.
  np.testing.assert_allclose(losses[:5], losses[30:35], rtol=1e-4)
  assert losses[29] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", sequential_heads.KINDS)
def test_evaluation(kind):
  net, rows = filled(kind), windows()
  found = head_measures.measure(net, [rows], block=4)
  targets = loss.future_targets(rows, N)
  (_, nll), _ = gradients(kind, "formula")
  np.testing.assert_allclose(
    found["nats"], nll / targets.weight_sums(), rtol=1e-5
  )
  assert 1 <= found["greedy"] <= N and 1 <= found["sampled"] <= N


@functools.cache
def inputs_of(kind):
  return filled(kind).read(windows().tokens, windows().segments)


@pytest.mark.parametrize("name", loss.IMPLEMENTATIONS)
def test_errors_name_the_numbers(name):
  net, rows, inputs = filled("reading"), windows(), inputs_of("reading")
  targets, scale = loss.future_targets(rows, N), jnp.ones(N)
  call = loss.IMPLEMENTATIONS[name]
  none = heads.Inputs(inputs.z, inputs.ctx)
  with pytest.raises(ValueError, match="reading heads .*Model.read"):
    call(net.heads, none, targets, scale)
  short = inputs._replace(embedded=inputs.embedded[:, :T])
  with pytest.raises(ValueError, match=r"13 tokens .* \(2, 11, 12\)"):
    call(net.heads, short, targets, scale)


first_choices = jax.jit(lambda net, tokens: net(tokens).argmax(-1))


def one_by_one(net, prompt, max_new):
  """What a Python loop writes: (text, first drafts, tokens of each pass).

  Every token, draft or text, is the first choice of one head on the tokens
  before it; a pass keeps the drafts that the text then confirms.
  """

  def choose(head, tokens, at):
    padded = np.zeros((1, 32 + N - 1), np.int32)
    padded[0, : len(tokens)] = tokens
    return int(first_choices(net, padded)[head, 0, at])

  text, first, counts = list(prompt), None, []
  while len(text) < len(prompt) + max_new + N:
    text.append(choose(0, text, len(text) - 1))
  length = len(prompt) + 1  # the bonus token of the prompt's pass is written
  while length < len(prompt) + max_new:
    given, last = text[:length], length - 2
    for head in range(1, N):
      given.append(choose(head, given, last))
    drafts = given[length:]
    first = first or drafts
    right = [a == b for a, b in zip(drafts, text[length:], strict=False)]
    accepted = (right + [False]).index(False)
    counts.append(min(accepted + 1, len(prompt) + max_new - length))
    length += counts[-1]
  return text[len(prompt) : len(prompt) + max_new], first, counts


def test_drafts_against_a_loop_token_by_token():
  """Of a small vocabulary some drafts are right by chance."""
  cfg = settings("sequential", vocab=3)
  prompts = [[1, 2, 0, 2, 2], [2], [0, 1, 1]]
  net = parameters.filled(lambda key: model.Model(cfg, key), 0.3, seed=2)
  decoder = sequential_heads.Decoder(net)
  assert isinstance(decoder, interface.Decoder)
  wanted = [one_by_one(net, prompt, 20) for prompt in prompts]
  got = decode.generate(decoder, prompts, heads=N, max_new=20)
  for text, counts, want in zip(got.tokens, got.per_pass, wanted, strict=True):
    assert text.tolist() == want[0]
    assert counts.tolist() == want[2]
  assert len({n for _, _, counts in wanted for n in counts}) > 1
  state = mocks.start(decoder, prompts, heads=N, max_new=20)
  assert state.drafts.tokens[..., 0].tolist() == [w[1] for w in wanted]


@pytest.mark.parametrize(
  "kind, done",
  [("reading", ["evaluation"]), ("linear", ["evaluation", "sample"])],
)
def test_a_run_says_once_that_it_writes_no_samples(kind, done, caplog):
  """At its start, and tries none."""
  cfg = config.Config(model=settings(kind))
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
  run = evaluations.Evaluations(cfg, mesh, None, None, None, None)
  said = "writes no samples: the heads of model.head='reading' read tokens"
  assert (said in caplog.text) == (kind == "reading")
  caplog.clear()
  tried = []
  run._attempt = lambda what, *_: tried.append(what)
  for number in (1, 2):
    run.run(number, None)
  assert tried == 2 * done and not caplog.text
