"""The runs of the sweep: each trains a model, and tests its head 1."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments.claims.induction import corpora, scales
from experiments.measure import device_loop, sweep
from mtp_jax import config
from mtp_jax.tasks import induction, stories

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
  if path:
    source = functools.partial(
      corpora.loaded,
      path,
      tokenizer,
      scale.test,
      scale.seq_len,
      max(scale.futures),
    )
    mixtures = [(0.0, scale.sizes, source)]
  else:
    mixtures = [
      (books, sizes, _source(scale, books))
      for books, sizes in ((0.0, scale.sizes), (scales.BOOKS, scale.mixed))
    ]
  return [
    _run(scale, size, n, seed, books, source)
    for books, sizes, source in mixtures
    for size in sizes
    for seed in range(scale.seeds)
    for n in scale.futures
  ]


def prepare(scale: scales.Scale) -> None:
  """Compiles the programs of three sizes side by side, on an accelerator.

  A CPU has no processors to spare for it. Of the built-in stories alone: a
  corpus of one's own is large enough for compilation not to matter.
  """
  if jax.default_backend() == "cpu":
    return
  vocab = len(stories.vocabulary())
  cfgs = [
    scale.config(size, n, 0, vocab, 0.0)
    for size in scale.sizes[:3]
    for n in scale.futures
  ]
  for cfg in cfgs:
    device_loop.compiled(cfg, scale.per_call)
  test = corpora.tested(scale.test, scale.names)
  some = stories.Stories(test.tokens[:1], test.lengths[:1], test.mentions[:1])
  device_loop.evaluate_ahead(cfgs, lambda net: induction.accuracy(net, some))


def _source(scale, books):
  return functools.partial(
    corpora.written,
    scale.tokens,
    scale.test,
    scale.names,
    books,
    scale.seq_len,
    max(scale.futures),
  )


def _run(scale, size, n, seed, books, source):
  cfg = scale.config(size, n, seed, 2, books)  # but for its vocabulary
  check = sweep.nothing
  overrides = {
    "size": size,
    "n": n,
    "books": books,
    "corpus": source.func.__name__,
    "test": scale.test,
    "evaluations": scale.evaluations,
    "dtype": cfg.model.dtype,
    "batch": cfg.data.batch,
    "seq_len": cfg.data.seq_len,
    "steps": cfg.train.steps,
    "peak": cfg.optim.peak,
  }
  if source.func is corpora.loaded:  # two such corpora are two sweeps
    path, tokenizer, *_ = source.args
    overrides |= {"path": str(path), "tokenizer": str(tokenizer)}
    check = functools.partial(corpora.check, path, tokenizer)
  else:
    overrides |= {"tokens": scale.tokens, "names": scale.names}
  name = f"{size} n={n}" + f" books={books:g}" * (books > 0)

  def configure(vocab):
    return scale.config(size, n, seed, vocab, books)

  measure = functools.partial(_measure, scale, configure, source, overrides)
  return sweep.Run(
    CLAIM,
    name,
    overrides,
    seed,
    measure,
    device_loop.saved_step,
    check,
  )


def _measure(
  scale: scales.Scale,
  configure: Callable[[int], config.Config],
  source: Callable[[], corpora.Corpus],
  overrides: Mapping[str, Any],
  folder: pathlib.Path,
) -> Iterator[sweep.Figure]:
  """Trains, or goes on, and yields the accuracy on the way."""
  corpus = source()
  cfg = configure(corpus.vocab)
  rows = functools.partial(_rows, cfg, corpus, scale.per_call)
  every = cfg.train.steps // scale.per_call // scale.evaluations
  for p in device_loop.train(
    cfg,
    rows,
    steps_per_call=scale.per_call,
    folder=folder,
    depends_on=overrides,
  ):
    for i, nats in enumerate(p.nats, 1):
      yield sweep.Figure(p.step, f"nats head={i}", nats)
    if p.step // scale.per_call % every:
      continue
    accuracy = induction.accuracy(p.net, corpus.test)
    yield sweep.Figure(p.step, "accuracy", accuracy)
    print(f"step {p.step}: {accuracy:.3f}, {p.seconds:.1f} s", flush=True)
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
