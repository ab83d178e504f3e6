"""pass@k of a finetuned model on held-out functions."""

import pathlib
from collections.abc import Iterator

from experiments.claims.finetuning import scales, ways
from experiments.measure import sweep
from mtp_jax import tokenizer
from mtp_jax.decode import layout
from mtp_jax.evaluate import pass_at_k, sandbox
from mtp_jax.model import model
from mtp_jax.tasks import functions, judging, pairs, samples
from mtp_jax.train import provenance

CLAIM = "finetuning"


def runs(
  scale: scales.Scale, folder: pathlib.Path, seeds: int
) -> list[sweep.Run]:
  """The runs of the claim, seed after seed."""
  before = scale.before
  overrides = {
    "width": before.model.width,
    "layers": before.model.layers,
    "pretrained": _tokens(before, before.train.steps),
    "finetuned": _tokens(before, scale.steps),
    "peak": scale.peak,
    "problems": scale.problems,
    "samples": scale.samples,
  }
  return [
    sweep.Run(CLAIM, way, overrides, seed, _measure(way, scale, folder, seed))
    for seed in range(seeds)
    for way in ways.WAYS
  ]


def _tokens(cfg, steps) -> int:
  return steps * cfg.data.batch * cfg.data.seq_len


def _measure(way, scale, folder, seed):
  def measure(place):
    file = folder / f"functions-{scale.documents}.jsonl"
    if not file.exists():
      pairs.write(file, functions.documents(scale.documents))
    data = pairs.data(file, loss_on="answer", held_out=0.02)
    after = scale.after(data)
    net = ways.finetuned(way, scale.before, after, seed, folder, place)
    yield from figures(net, scale, seed, place)

  return measure


def figures(
  net: model.Model, scale: scales.Scale, seed: int, place: pathlib.Path
) -> Iterator[sweep.Figure]:
  """pass@k by temperature and of the best one, for k = 1, 2, 4, ..."""
  codec, step = tokenizer.Bytes(), scale.steps
  problems = functions.problems(scale.problems)
  settings = samples.SampleSettings(
    temperatures=scale.temperatures,
    count=scale.samples,
    max_new=160,
    seed=seed,
    rows=scale.rows,
    model=provenance.fingerprint(net),
  )
  rows = samples.draw(
    layout.lay_out(net, codec.vocab),
    codec,
    problems,
    settings,
    place / "samples.jsonl",
  )
  # `find` refuses where there is no sandbox.
  executor = sandbox.Sandbox(sandbox.find(), sandbox.Limits(cpu=2, wall=20.0))
  verdicts = judging.judge(executor, problems, rows, place / "verdicts.jsonl")
  counts = pass_at_k.count([p.name for p in problems], verdicts)
  ks = [2**i for i in range(scale.samples.bit_length())]
  ks = [k for k in ks if k <= scale.samples]
  for name, by_k in pass_at_k.table(scale.samples, counts, ks).items():
    for k, estimate in by_k.items():
      yield sweep.Figure(step, f"pass@{k} {name}", estimate.mean)
