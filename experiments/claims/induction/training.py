"""The runs of the sweep: each trains a model, and tests its head 1."""

import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from experiments.claims.induction import corpora, scales
from experiments.measure import device_loop, sweep
from mtp_jax import config
from mtp_jax.tasks import induction

CLAIM = "induction"


def runs(
  scale: scales.Scale,
  path: pathlib.Path | None = None,
  tokenizer: str = "",
) -> list[sweep.Run]:
  """The sweep, small sizes and the pure stories first.

  Args:
    scale: the sizes.
    path: a corpus of stories; None: the built-in stories.
    tokenizer: of the corpus at `path`.
  """
  found = []
  for books in scale.books[: 1 if path else None]:
    most = max(scale.futures)
    shape = scale.seq_len, most
    if path:
      source = functools.partial(
        corpora.loaded, path, tokenizer, scale.test, *shape
      )
    else:
      source = functools.partial(
        corpora.written, scale.tokens, scale.test, scale.names, books, *shape
      )
    found += [
      _run(scale, size, n, seed, books, source)
      for size in scale.sizes
      for seed in range(scale.seeds)
      for n in scale.futures
    ]
  return found


def _run(scale, size, n, seed, books, source):
  overrides = {
    "size": size,
    "n": n,
    "books": books,
    "corpus": source.func.__name__,
    "tokens": scale.tokens,
    "names": scale.names,
    "test": scale.test,
    "batch": scale.batch,
    "seq_len": scale.seq_len,
    "steps": scale.steps,
    "peak": scale.peak,
  }
  name = f"{size} n={n}" + f" books={books:g}" * (books > 0)
  measure = functools.partial(_measure, scale, size, n, seed, source)
  return sweep.Run(CLAIM, name, overrides, seed, measure)


def _measure(
  scale: scales.Scale,
  size: str,
  n: int,
  seed: int,
  source: Callable[[], corpora.Corpus],
  folder: pathlib.Path,
) -> Iterator[sweep.Figure]:
  """Trains, and yields the accuracy on the way and the best one at the end."""
  del folder
  corpus = source()
  cfg = scale.config(size, n, seed, corpus.vocab)
  rows = functools.partial(_rows, cfg, corpus, scale.per_call)
  every = scale.steps // scale.per_call // scale.evaluations
  best = 0.0
  for p in device_loop.train(cfg, rows, steps_per_call=scale.per_call):
    for i, nats in enumerate(p.nats, 1):
      yield sweep.Figure(p.step, f"nats head={i}", nats)
    if p.step // scale.per_call % every:
      continue
    accuracy = induction.accuracy(p.net, corpus.test)
    best = max(best, accuracy)
    yield sweep.Figure(p.step, "accuracy", accuracy)
    print(f"step {p.step}: {accuracy:.3f}, {p.seconds:.1f} s", flush=True)
  yield sweep.Figure(p.step, "best accuracy", best)
  if p.seconds:
    yield sweep.Figure(p.step, "tokens_per_second", p.tokens / p.seconds)


def _rows(cfg: config.Config, corpus: corpora.Corpus, steps: int, call: int):
  """The rows of one call; every epoch has an order of its own."""
  count, total = steps * cfg.data.batch, len(corpus.rows.tokens)
  places = np.arange(call * count, (call + 1) * count)
  chosen = np.empty(count, np.int64)
  for epoch in range(places[0] // total, places[-1] // total + 1):
    random = np.random.default_rng((cfg.train.seed, epoch))
    here = places // total == epoch
    chosen[here] = random.permutation(total)[places[here] % total]
  width = cfg.data.seq_len + cfg.model.n_future
  return jax.tree.map(lambda a: a[chosen, :width], corpus.rows)
