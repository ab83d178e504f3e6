"""Stage 1: does the device compute what the formulas say?"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.engineering.accelerator import record, scales
from experiments.measure import compare, study, timing
from mtp_jax import config, loss
from mtp_jax.data import batch as batch_lib
from mtp_jax.decode import generate, layout
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import attention, model

# Distances are norms of differences over the norm of what is right.
KERNEL = 0.02  # of an attention kernel in bfloat16
GRADIENT = 1e-6  # of the losses in float32: the limit of tests/test_loss.py
# The serial loss in bfloat16 may be so much further from float32 than the
# formula in bfloat16 is: another order of additions has other rounding errors.
ROUNDING = 1.25
# Top-two margins below which a text may part from ordinary decoding's.
MARGINS = {
  "float32": compare.EPSILON,
  "float32, JAX's default precision": 0.02,  # TF32 on recent GPUs
  "bfloat16": 0.1,
}
TURNS = 10  # timed calls of a kernel


def run(stage: record.Stage, scale: scales.Scale) -> None:
  """The kernels that training needs, losses, texts, the other kernels."""

  def attend(documents):
    for shape in scale.attention:
      stage.attempt(
        attention_name(shape, documents),
        functools.partial(kernels, shape, documents),
        kind="attention",
        estimate=15,
      )

  attend(documents=True)
  stage.attempt(
    "losses", functools.partial(losses, scale), kind="losses", estimate=10
  )
  for name in scale.precisions:
    stage.attempt(
      f"texts, {name}",
      functools.partial(texts, scale, name),
      kind="texts",
      estimate=10,
    )
  attend(documents=False)


def attention_name(shape: scales.Attention, documents: bool) -> str:
  """The name of a result of `kernels`."""
  name = f"attention, {shape.tokens} tokens, {shape.channels} channels"
  return f"{name}, documents" if documents else name


def kernels(shape: scales.Attention, documents: bool) -> dict:
  """The platform's kernel and XLA's in bfloat16, against float32."""
  platform = jax.devices()[0].platform
  B, T, H, C = dataclasses.astuple(shape)
  rng = np.random.default_rng(0)
  *qkv, weights = rng.normal(size=(4, B, T, H, C)).astype(jnp.bfloat16)
  segments = None
  if documents:  # three in each row, on average
    segments = np.cumsum(rng.random((B, T)) < 2 / T, 1, dtype=np.int32)

  def compiled(call, arguments, precision=None):
    def total(q, k, v):
      y = call(q, k, v, segments)
      return (y.astype(jnp.float32) * weights).sum(), y

    program = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    # In each thread: the setting is a thread's own.
    with jax.default_matmul_precision(precision):
      return program.lower(*arguments).compile()

  exact = [a.astype(np.float32) for a in qkv]
  tried = {
    attention.choose(name, platform): name for name in ("xla", "auto")
  }  # on a CPU they are one
  works = {n: functools.partial(compiled, k, qkv) for k, n in tried.items()}
  works["exact"] = functools.partial(compiled, attention.xla, exact, "highest")
  with warnings.catch_warnings(record=True) as refused:
    warnings.simplefilter("always")
    programs = record.together(works)
  for each in programs.values():
    if isinstance(each, Exception):
      raise each
  (_, want), want_grads = programs.pop("exact")(*exact)
  qkv, found = jax.device_put(qkv), {"platform": platform}
  for name, call in programs.items():
    (_, got), got_grads = jax.block_until_ready(call(*qkv))
    found[name] = {
      "distance": distance(got, want),
      "gradient_distance": distance(got_grads, want_grads),
      "milliseconds": timing.median(functools.partial(call, *qkv), TURNS) * 1e3,
    }
  auto = found["auto"]
  most = max(auto["distance"], auto["gradient_distance"])
  return found | {
    "refused": [str(w.message) for w in refused if "cuDNN" in str(w.message)],
    **dataclasses.asdict(study.Bound.at_most(most, KERNEL)),
  }


def losses(scale: scales.Scale) -> dict:
  """Gradients of the serial loss and of the formula, in both dtypes."""
  platform = jax.devices()[0].platform
  N, B, T = scale.checked.n_future, scale.rows, scale.tokens
  tokens = np.random.default_rng(0).integers(
    scale.checked.vocab, size=(B, T + N), dtype=np.int32
  )
  batch = batch_lib.of(tokens, 1 + np.cumsum(tokens == 3, 1, dtype=np.int32))

  def gradient(dtype, name):
    low = dtype == "bfloat16"  # no kernel but XLA's takes float32

    def total(net):
      found = loss.token_loss(
        net,
        batch,
        loss.future_targets(batch, N),
        jnp.full((N,), 1 / (B * T)),
        loss.Settings(
          implementation=name,
          block=max(T // 4, 1),
          kernel=attention.choose("auto" if low else "xla", platform),
        ),
      )
      return found[0]

    net = random_model(dataclasses.replace(scale.checked, dtype=dtype))
    # In each thread: the setting is a thread's own.
    with jax.default_matmul_precision(None if low else "highest"):
      return jax.jit(jax.grad(total))(net)

  random_model(scale.checked)  # before the threads ask for it
  found = record.together(
    {
      (dtype, name): functools.partial(gradient, dtype, name)
      for dtype in ("float32", "bfloat16")
      for name in ("formula", "serial")
    }
  )
  for each in found.values():
    if isinstance(each, Exception):
      raise each
  want = found.pop(("float32", "formula"))
  far = {" ".join(key): distance(each, want) for key, each in found.items()}
  limits = {
    "float32 serial": GRADIENT,
    "bfloat16 serial": ROUNDING * far["bfloat16 formula"],
  }
  bounds = {k: study.Bound.at_most(far[k], v) for k, v in limits.items()}
  met = all(bound.met for bound in bounds.values())
  return {"distances": far, "bounds": bounds, "met": met}


def texts(scale: scales.Scale, name: str) -> dict:
  """A chain's and a tree's texts beside ordinary decoding's, and near-ties.

  With random weights few drafts are right: what is compared is what wide
  windows do to head 1. Stage 4 compares texts of a trained model.
  """
  precision = "highest" if name == "float32" else None
  cfg = dataclasses.replace(scale.checked, dtype=name.split(",")[0])
  decoder = layout.lay_out(random_model(cfg))
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, cfg.vocab, (scale.rows, 16))
  acceptance = np.full((cfg.n_future - 1, 3), 0.3)
  trees = {
    compare.name(t): t
    for t in (
      tree_lib.chain(1),
      tree_lib.chain(cfg.n_future),
      tree_lib.build(acceptance, 16),
    )
  }

  def write(tree):
    # In each thread: the setting is a thread's own.
    with jax.default_matmul_precision(precision):
      return generate.generate(
        decoder, prompts, heads=tree, max_new=scale.tokens
      )

  results = record.together(
    {n: functools.partial(write, t) for n, t in trees.items()}
  )
  for found in results.values():
    if isinstance(found, Exception):
      raise found
  ordinary = results.pop("ordinary")
  bound = MARGINS[name]  # of the widest margin at which a text parts
  rows = {
    n: compare.same([r], [ordinary])
    | {"tokens_per_forward": r.tokens_per_forward}
    for n, r in results.items()
  }
  margins = [m for row in rows.values() for m in row["margins"]]
  return {
    "texts": rows,
    "tokens": scale.rows * scale.tokens,
    "near_ties": {str(e): ordinary.near_ties(e) for e in (1e-4, 1e-2, 1e-1)},
    **dataclasses.asdict(study.Bound.at_most(max(margins, default=0), bound)),
  }


def random_model(cfg: config.Model) -> model.Model:
  """Of one seed; the parameters are the same, whatever `cfg.dtype` is."""
  like = jax.eval_shape(functools.partial(model.Model, cfg), jax.random.key(0))
  made = _made(dataclasses.replace(cfg, dtype="float32"))
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(made))


@functools.cache
def _made(cfg):
  return jax.jit(functools.partial(model.Model, cfg))(jax.random.key(0))


def working_attention(stage: record.Stage, scale: scales.Scale) -> str:
  """'auto' where the platform's kernel was right in stage 1, else 'xla'.

  Also 'auto' where stage 1 did not get so far.
  """
  failed = stage.whole["stages"].get("exactness", {}).get("failed", {})
  for shape in scale.attention:
    name = attention_name(shape, documents=True)
    right = stage.recorded("exactness", name).get("met", True)
    if not right or name in failed:
      return "xla"
  return "auto"


@jax.jit
def _norms(found, wanted):
  found, wanted = (
    [a.astype(jnp.float32) for a in jax.tree.leaves(tree)]
    for tree in (found, wanted)
  )
  difference = [a - b for a, b in zip(found, wanted, strict=True)]
  return optax.tree.norm(difference), optax.tree.norm(wanted)


def distance(found, wanted) -> float:
  """Norm of the difference over the norm of `wanted`, of whole pytrees."""
  difference, size = _norms(jax.tree.leaves(found), jax.tree.leaves(wanted))
  return float(difference / size)
