"""Three implementations of one loss: values, gradients, memory, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import flops
from mtp_jax import config, loss
from mtp_jax.data import batch
from mtp_jax.model import heads as heads_lib
from mtp_jax.model import layers, model

N, B, T, V = 3, 2, 11, 83
KINDS = config.HEAD_KINDS
RIVALS = ("serial", "checkpointed")
CHAINS = ("causal", "anticausal")
# Programs that run once on small arrays: compiling them is all they cost.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def settings(kind="parallel", **changes):
  fields = {
    "vocab": V,
    "width": 28,
    "mlp": 31,
    "layers": 5,
    "attn_heads": 2,
    "kv_heads": 1,
    "n_future": N,
    "head": kind,
  }
  return config.Model(**(fields | changes))


def build(cfg, seed=0):
  """A model of normal parameters, without compiling its initialisers."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
  return jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape, scale=0.3), a.dtype), shapes
  )


def case(kind, dtype="float32", remat="none"):
  return made(kind, dtype, remat)


@functools.cache
def made(kind, dtype, remat):
  """heads, inputs, targets and scale of two documents a row.

  Some targets have weight 0, in the middle of a document too, or a fraction.
  """
  cfg = settings(kind, dtype=dtype, remat=remat)
  net, keys = build(cfg), jax.random.split(jax.random.key(1), 2)
  tokens = jax.random.randint(keys[0], (B, T + N), 0, V)
  segments = jnp.asarray([[1] * 5 + [2] * (T + N - 5), [0] * 2 + [1] * 12])
  weight = np.ones(tokens.shape, np.float32)
  weight[0, 7:9] = weight[1, :4] = 0
  weight[1, -4:] = 0.5
  ctx = layers.training_context(segments[:, :T], cfg)
  z = jax.random.normal(keys[1], (B, T, cfg.width)).astype(dtype)
  targets = loss.future_targets(batch.Batch(tokens, segments, weight), N)
  inputs = heads_lib.Inputs(z, ctx)
  return net.heads, inputs, targets, jnp.asarray([0.7, 0.2, 0.05])


def run(
  name, kind, block=4, *, scale=None, weight=None, dtype="float32", remat="none"
):
  """((total, nll), gradients of heads, z and scale) of a `case`.

  scale and weight may be others than the case's: the program is the same.
  """
  heads, inputs, targets, its_scale = case(kind, dtype, remat)
  return program(name, kind, block, dtype, remat)(
    heads,
    inputs.z,
    its_scale if scale is None else scale,
    targets.weight if weight is None else weight,
  )


@functools.cache
def program(name, kind, block, dtype, remat):
  _, inputs, targets, _ = case(kind, dtype, remat)

  @jit
  def step(heads, z, scale, weight):
    def total(heads, z, scale):
      call, here = loss.IMPLEMENTATIONS[name], targets._replace(weight=weight)
      return call(heads, inputs._replace(z=z), here, scale, block=block)

    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(heads, z, scale)

  return step


reference = functools.cache(functools.partial(run, "formula"))


def distance(a, b):
  """Norm of the difference of two trees over the norm of the second."""
  a, b = (
    np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])
    for tree in (a, b)
  )
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def assert_close(found, wanted, tolerance):
  """Total, per-head losses, and each gradient array by its own norm."""
  for (path, a), (_, b) in zip(
    *(jax.tree_util.tree_leaves_with_path(x) for x in (found, wanted)),
    strict=True,
  ):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert distance(a, b) < tolerance, jax.tree_util.keystr(path)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_future_targets_against_loops(n, seed):
  rng = np.random.default_rng(seed)
  length = 17 + n
  tokens = rng.integers(0, V, (B, length))
  # documents of 1 to 4 tokens; number 0 is no document, and may come twice
  numbers = rng.integers(0, 5, (B, length)).cumsum(1) % 7
  segments = np.stack(
    [np.repeat(row, rng.integers(1, 5))[:length] for row in numbers]
  )
  weight = rng.random((B, length)).round(1).astype(np.float32)
  wanted, weights = np.full((n, B, 17), -1), np.zeros((n, B, 17))
  sums = np.zeros(n)
  for i in range(n):
    for b in range(B):
      for t in range(17):
        weights[i, b, t] = weight[b, t + 1 + i]
        if segments[b, t] == segments[b, t + 1 + i] and segments[b, t] != 0:
          wanted[i, b, t] = tokens[b, t + 1 + i]
          sums[i] += weight[b, t + 1 + i]
  windows = batch.Batch(*map(jnp.asarray, (tokens, segments, weight)))
  found = loss.future_targets(windows, n)
  assert found.tokens.dtype == jnp.int32
  np.testing.assert_array_equal(found.tokens, wanted)
  np.testing.assert_allclose(found.weight, weights, rtol=1e-7)
  np.testing.assert_allclose(found.weight_sums(), sums, rtol=1e-6)


def test_formula_is_the_sum_over_all_logits():
  """The oracle itself, against float64 on the model's own logits."""
  cfg = settings()
  net = build(cfg)
  keys = jax.random.split(jax.random.key(2), 2)
  tokens = jax.random.randint(keys[0], (B, T + N), 0, V)
  targets = jax.random.randint(keys[1], (N, B, T), -1, V)
  logits = np.float64(jit(lambda net: net(tokens[:, :T]))(net))
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)
  picked = -picked[..., 0] * np.asarray(targets >= 0)
  scale = np.asarray([1.0, 0.5, 2.0])
  settings_ = loss.Settings(implementation="formula")
  run = jit(functools.partial(loss.token_loss, settings=settings_))
  for name, weight in WEIGHTS.items():
    wanted = (picked * weight).sum((1, 2))
    total, nll = run(
      net, batch.of(tokens), loss.Targets(targets, jnp.asarray(weight)), scale
    )
    np.testing.assert_allclose(nll, wanted, rtol=1e-6, err_msg=name)
    assert total == pytest.approx(wanted @ scale, rel=1e-6)


def weights():
  """Weights [N, B, T] by what is special about them."""
  ones = np.ones((N, B, T), np.float32)
  middle, row = ones.copy(), ones.copy()
  middle[:, 0, 3:6] = row[:, 1] = 0
  fractions = np.random.default_rng(0).random(ones.shape, np.float32)
  return {
    "all 1": ones,
    "0 in the middle of a document": middle,
    "0 in a row": row,
    "0 in the batch": 0 * ones,
    "fractions": fractions,
  }


WEIGHTS = weights()


@pytest.mark.parametrize("kind", ["parallel", "causal"])
def test_weights(kind):
  """Serial and checkpointed, and their gradients, equal the formula's."""

  def of(name, weight):
    value, gradients = run(name, kind, weight=weight)
    return value, gradients[:2]  # of heads and z

  for name, weight in WEIGHTS.items():
    wanted = of("formula", weight)
    d_z = np.abs(wanted[1][1]).max(-1)  # [B, T]
    for rival in RIVALS:
      found = of(rival, weight)
      if not weight.any():
        assert not any(g.any() for g in jax.tree.leaves((found, wanted)))
        continue
      assert distance(found, wanted) <= 1e-6, (name, rival)
    if name == "0 in a row":  # where nothing is predicted, nothing is learnt
      assert d_z[0].any() and not d_z[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RIVALS)
def test_equals_the_formula(name, kind):
  # Single arrays sum in another order, with cancellation: 1e-5. All together,
  # a head-by-head gradient is the all-at-once gradient to 1e-6.
  found, wanted = run(name, kind), reference(kind)
  assert_close(found, wanted, 1e-5)
  assert distance(found[1][:2], wanted[1][:2]) <= 1e-6
  assert found[1][2].shape == (N,)


@pytest.mark.parametrize("kind, block", [("parallel", 1), ("causal", 256)])
def test_blocks_change_nothing(kind, block):
  assert_close(run("serial", kind, block), reference(kind), 1e-5)


@pytest.mark.parametrize("kind", ["parallel", "anticausal", "unembedding"])
def test_undifferentiated_values(kind):
  total, nll = jit(functools.partial(loss.serial, block=4))(*case(kind))
  (wanted, wanted_nll), _ = reference(kind)
  np.testing.assert_allclose(nll, wanted_nll, rtol=1e-6)
  assert total == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("kind", ["parallel", "causal"])
def test_heads_without_weight_get_no_gradient(kind):
  scale = jnp.asarray([1.0, 0.0, 1.0])
  (_, nll), grads = run("serial", kind, scale=scale)
  (_, wanted), formula = run("formula", kind, scale=scale)
  np.testing.assert_allclose(nll, wanted, rtol=1e-6)  # still reported
  # An exact 0 has no relative distance: compare by the norm of all together.
  assert distance(grads, formula) < 1e-6
  if kind == "parallel":
    assert not any(g[1].any() for g in jax.tree.leaves(grads[0].layers))
    assert grads[0].layers.wq[0].any()


def test_nothing_to_predict_is_zero():
  heads, inputs, targets, scale = case("parallel")
  nothing = targets._replace(tokens=jnp.full_like(targets.tokens, -1))
  (total, nll), grads = jax.value_and_grad(loss.serial, has_aux=True)(
    heads, inputs, nothing, scale
  )
  assert total == 0 and not nll.any()
  assert not any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["parallel", "causal"])
def test_cotangent_multiplies(kind):
  heads, inputs, targets, scale = case(kind)

  def three(heads, z, scale):
    here = inputs._replace(z=z)
    return 3 * loss.serial(heads, here, targets, scale, block=4)[0]

  found = jit(jax.grad(three, (0, 1, 2)))(heads, inputs.z, scale)
  wanted = jax.tree.map(lambda g: 3 * g, reference(kind)[1])
  assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("name", loss.IMPLEMENTATIONS)
def test_no_gradient_through_the_second_result(name):
  heads, inputs, targets, scale = case("parallel")

  def second(heads, z, scale):
    call = loss.IMPLEMENTATIONS[name]
    return call(heads, inputs._replace(z=z), targets, scale)[1].sum()

  grads = jit(jax.grad(second, (0, 1, 2)))(heads, inputs.z, scale)
  assert not any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["parallel", "causal", "unembedding"])
def test_bfloat16_activations(kind):
  """Against float32 on the same bfloat16 z: the rounding of activations.

  bfloat16 keeps 8 bits, 2**-9 a rounding, and a head rounds some ten times
  on the way down and up: 2 % of each gradient's norm. Rounded sums would
  not show at this size; the next test is theirs.
  """
  heads, inputs, targets, scale = case(kind, "bfloat16")
  z = inputs.z
  (total, nll), (d_heads, d_z, d_scale) = run("serial", kind, dtype="bfloat16")
  assert d_z.dtype == z.dtype == jnp.bfloat16
  assert {g.dtype for g in jax.tree.leaves((d_heads, d_scale, nll))} == {
    jnp.dtype("float32")
  }

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def formula(heads, z):
    return loss.formula(heads, inputs._replace(z=z), targets, scale)

  exact = formula(heads, z.astype("float32"))
  assert total == pytest.approx(float(exact[0][0]), rel=2e-3)
  assert distance(d_heads, exact[1][0]) < 0.02
  assert distance(d_z, exact[1][1]) < 0.02


def test_sums_over_heads_are_float32():
  """64 equal heads: dz is 64 times one head's dz to one rounding of bfloat16,
  which a sum in bfloat16 misses by several."""
  many = 64
  cfg = settings("linear", n_future=many, dtype="bfloat16")
  _, inputs, targets, _ = case("linear", "bfloat16")
  heads = build(cfg).heads
  heads = heads.replace(
    layers=jax.tree.map(
      lambda a: jnp.broadcast_to(a[:1], a.shape), heads.layers
    )
  )
  targets = jax.tree.map(
    lambda a: jnp.broadcast_to(a[:1], (many, B, T)), targets
  )

  @jit
  @functools.partial(jax.grad, argnums=1)
  def d_z(scale, z):
    here = inputs._replace(z=z)
    return loss.serial(heads, here, targets, scale, block=4)[0]

  one = d_z(jnp.zeros(many).at[0].set(1.0), inputs.z)
  np.testing.assert_array_equal(d_z(jnp.ones(many), inputs.z), many * one)


@pytest.mark.parametrize(
  "kind, policy", [("parallel", "dots"), ("anticausal", "full")]
)
def test_rematerialised_layers_give_the_same(kind, policy):
  assert_close(run("serial", kind, remat=policy), reference(kind), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_work_of_each_implementation(kind):
  """FLOPs: a value costs one forward pass, serial a gradient no more than the
  formula's, checkpointed every head's forward pass once more."""
  heads, inputs, targets, scale = case(kind)
  z = inputs.z

  def total(name, heads, z):
    call = loss.IMPLEMENTATIONS[name]
    return call(heads, inputs._replace(z=z), targets, scale, block=T)[0]

  def work(name, gradient):
    fun = functools.partial(total, name)
    fun = jax.value_and_grad(fun, (0, 1)) if gradient else fun
    return flops.count(fun, heads, z)

  unembed = 2 * N * B * (T + 1) * V * z.shape[-1]  # T=11 is two blocks of 6
  padding = unembed // (T + 1)
  forward = work("formula", gradient=False)
  both = work("formula", gradient=True)
  assert work("serial", gradient=False) == forward + padding
  serial = work("serial", gradient=True)
  assert abs(serial - both - 3 * padding) <= 6 * N  # scale's own products
  assert work("checkpointed", gradient=True) > both + 0.9 * (unembed - padding)


@functools.cache
def temp(kind, name, n, block=8):
  """Temporary bytes of a compiled loss and gradient, but for the gradients of
  the extra heads' own parameters.

  Heads come on top of two trunk layers. Those of a chain leave activations
  behind as any layer does, so they take the place of trunk layers.
  """
  B, T, V = 2, 64, 4001
  own = 0 if kind in ("linear", "unembedding") else n
  cfg = settings(
    kind, vocab=V, n_future=n, layers=6 if kind in CHAINS else 2 + own
  )

  def step(net, windows, targets):
    def total(net):
      how = loss.Settings(implementation=name, block=block)
      return loss.token_loss(net, windows, targets, jnp.ones(n), how)

    return jax.value_and_grad(total, has_aux=True)(net)

  net = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
  shape = n, B, T
  targets = loss.Targets(
    jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct(shape, "float32")
  )
  compiled = jit(step).lower(net, batch.abstract(B, T + n), targets).compile()
  parameters = net.heads.layers
  if kind == "unembedding":
    parameters = net.heads.unembed
  extra = sum(4 * a.size // n for a in jax.tree.leaves(parameters)) * (n - 1)
  return compiled.memory_analysis().temp_size_in_bytes - extra


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_heads(kind):
  window = 4 * 2 * 64 * 4001  # one head's logits
  growth = temp(kind, "serial", 4) - temp(kind, "serial", 1)
  assert growth < 0.05 * window


def test_a_block_as_long_as_the_window_is_no_exception():
  """A [D, V] array for every head of a chain, were there only one block."""
  growth = temp("causal", "serial", 4, 64) - temp("causal", "serial", 1, 64)
  assert growth < 0.5 * 4 * 28 * 4001


def test_memory_of_the_rivals():
  window = 4 * 2 * 64 * 4001
  formula = temp("parallel", "formula", 4)
  assert formula > 4 * window
  checkpointed = temp("parallel", "checkpointed", 4)
  assert temp("parallel", "serial", 4) < 0.4 * checkpointed < 0.4 * formula
  assert temp("parallel", "serial", 4) < 0.2 * formula


def test_every_configured_loss_exists():
  assert set(config.LOSSES) == set(loss.IMPLEMENTATIONS)


@pytest.mark.parametrize("name", loss.IMPLEMENTATIONS)
def test_errors_name_the_numbers(name):
  heads, inputs, targets, scale = case("parallel")
  call = loss.IMPLEMENTATIONS[name]
  tokens, weight = targets
  with pytest.raises(ValueError, match=r"\(2, 2, 11\) .* 3 heads .*11, 28"):
    call(heads, inputs, loss.Targets(tokens[:2], weight), scale)
  with pytest.raises(ValueError, match=r"weight \(3, 2, 7\)"):
    call(heads, inputs, loss.Targets(tokens, weight[..., :7]), scale)
  with pytest.raises(ValueError, match=r"scale \(2,\) .* 3 heads"):
    call(heads, inputs, targets, scale[:2])
  with pytest.raises(ValueError, match="batch 2 .* 3 shards"):
    call(heads, inputs, targets, scale, shards=3)


def test_more_errors():
  tokens = jnp.zeros((B, 3), jnp.int32)
  with pytest.raises(ValueError, match="3 tokens .* 3 future"):
    loss.future_targets(batch.of(tokens), 3)
  with pytest.raises(ValueError, match=r"\(2, 2\), but tokens \(2, 3\)"):
    loss.future_targets(batch.of(tokens, segments=tokens[:, :2]), 1)
  with pytest.raises(ValueError, match=r"weight \(3,\), but tokens \(2, 3\)"):
    loss.future_targets(batch.of(tokens, weight=jnp.ones(3)), 1)
  with pytest.raises(ValueError, match="no loss 'seriel'; .*serial"):
    loss.token_loss(None, None, None, None, loss.Settings("seriel"))
