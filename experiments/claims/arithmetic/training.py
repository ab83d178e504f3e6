"""The runs of the sweep: each trains a model, and tests its head 1."""

import functools
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.claims.arithmetic import scales
from experiments.measure import device_loop, sweep
from mtp_jax import config
from mtp_jax.data import batch as batch_lib
from mtp_jax.tasks import arithmetic

CLAIM = "arithmetic"


def runs(scale: scales.Scale) -> list[sweep.Run]:
  """The sweep, what is worth most first."""
  first = next(iter(scale.shapes))
  settings = [(size, scale.pauses[0]) for size in scale.shapes]
  settings += [(first, pauses) for pauses in scale.pauses[1:]]
  return [
    _run(scale, size, n, pauses, seed)
    for size, pauses in settings
    for seed in range(scale.seeds)
    for n in scale.futures
  ]


def prepare(scale: scales.Scale) -> None:
  """Compiles the programs of the first size side by side, on an accelerator.

  A CPU has no processors to spare for it.
  """
  if jax.default_backend() == "cpu":
    return
  size = next(iter(scale.shapes))
  cfgs = [scale.config(size, n, 0) for n in scale.futures]
  for cfg in cfgs:
    device_loop.compiled(cfg, scale.per_call)
  test = _test(scale.tested, scale.expressions)
  some = arithmetic.Expressions(
    test.text[: scale.rows],
    test.lengths[: scale.rows],
    test.values[: scale.rows],
  )

  def evaluate(net):
    arithmetic.exact_match(net, some, scale.pauses[0], rows=scale.rows)

  device_loop.evaluate_ahead(cfgs, evaluate)


def _run(scale, size, n, pauses, seed):
  name = f"{size} n={n}" + f" pauses={pauses}" * (pauses > 0)
  cfg = scale.config(size, n, seed)
  overrides = {
    "size": size,
    "n": n,
    "pauses": pauses,
    "width": cfg.model.width,
    "layers": cfg.model.layers,
    "batch": cfg.data.batch,
    "seq_len": cfg.data.seq_len,
    "steps": cfg.train.steps,
    "peak": cfg.optim.peak,
    "trained": scale.trained,
    "tested": scale.tested,
    "expressions": scale.expressions,
    "evaluations": scale.evaluations,
    "dtype": cfg.model.dtype,
    "answers_only": scale.answers_only,
  }
  measure = functools.partial(_measure, cfg, scale, pauses, overrides)
  return sweep.Run(
    CLAIM, name, overrides, seed, measure, device_loop.saved_step
  )


def _measure(
  cfg: config.Config,
  scale: scales.Scale,
  pauses: int,
  overrides: Mapping[str, Any],
  folder: pathlib.Path,
) -> Iterator[sweep.Figure]:
  """Trains, or goes on; yields exact match by number of operations."""
  every = scale.steps // scale.per_call // scale.evaluations
  test = _test(scale.tested, scale.expressions)
  operations = np.repeat(np.arange(1, scale.tested + 1), scale.expressions)
  order = np.random.default_rng((3, cfg.train.seed)).permutation(
    scale.steps // scale.per_call
  )

  def chunk_of(call):
    T, N = cfg.data.seq_len, cfg.model.n_future
    text = Text(
      scale.trained, pauses, scale.answers_only, T, max(scale.futures)
    )
    chunk = rows(text, scale.per_call * cfg.data.batch, int(order[call]))
    return jax.tree.map(lambda a: a[:, : T + N], chunk)

  for p in device_loop.train(
    cfg,
    chunk_of,
    steps_per_call=scale.per_call,
    folder=folder,
    depends_on=overrides,
  ):
    calls = p.step // scale.per_call
    for i, nats in enumerate(p.nats, 1):
      yield sweep.Figure(p.step, f"nats head={i}", nats)
    if calls % every:
      continue
    begin = time.monotonic()
    hits = arithmetic.exact_match(p.net, test, pauses, rows=scale.rows)
    for m in range(1, scale.tested + 1):
      right = hits[operations == m].mean()
      yield sweep.Figure(p.step, f"exact_match m={m}", right)
    print(f"step {p.step}: {hits.mean():.3f} in {time.monotonic() - begin:.1f}")
    if p.seconds:
      speed = p.tokens / p.seconds
      yield sweep.Figure(p.step, "tokens_per_second", speed)


@functools.cache
def _test(tested: int, expressions: int) -> arithmetic.Expressions:
  """The fixed test expressions, those of m = 1 first."""
  operations = np.repeat(np.arange(1, tested + 1), expressions)
  return arithmetic.draw(np.random.default_rng(1), operations)


class Text(NamedTuple):
  """What the rows hold that a model is trained on."""

  trained: int  # operations of an expression: 1 to this
  pauses: int  # pause tokens
  answers_only: bool  # the question's tokens are not learnt
  seq_len: int  # T
  n_future: int  # N, the largest of all runs


# All runs read the same expressions. Where a training has no more calls than
# the cache holds, they are drawn once.
@functools.lru_cache(maxsize=64)
def rows(text: Text, count: int, chunk: int) -> batch_lib.Batch:
  """`count` rows of T+N tokens; each chunk has other expressions.

  At no more than three quarters binary operations an expression of m
  operations has 5 + 6.75 m characters on average.
  """
  random = np.random.default_rng((2, chunk))
  mean = 5 + 6.75 * (1 + text.trained) / 2 + text.pauses + arithmetic.FRAME
  # Rows are not full, so these would be enough without the spare ones.
  some = int(1.1 * count * text.seq_len / mean) + 10
  found = arithmetic.draw(random, random.integers(1, text.trained + 1, some))
  packed = arithmetic.pack(
    found,
    text.pauses,
    seq_len=text.seq_len,
    reach=text.n_future,
    answers_only=text.answers_only,
  )
  return jax.tree.map(lambda a: _small(a[:count]), packed)


def _small(values):
  """In integers of two bytes: these are kept for all runs."""
  return values.astype(np.int16)
