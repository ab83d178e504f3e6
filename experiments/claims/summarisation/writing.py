"""ROUGE of a finetuned model on held-out pairs of the built-in tasks."""

import pathlib
from collections.abc import Sequence

import mtp_jax
from experiments.claims.finetuning import scales, ways
from experiments.measure import sweep
from mtp_jax import tokenizer
from mtp_jax.evaluate import rouge
from mtp_jax.tasks import pairs, subset, summaries

CLAIM = "summarisation"
TASKS = summaries.BUILT_IN
_SIZE = 160  # characters of a text; with its summary it fits a window
_LONGEST = 80  # characters of a summary
_HELD_OUT = 0.1


def runs(
  scale: scales.Scale,
  folder: pathlib.Path,
  seeds: int,
  tasks: Sequence[str] = TASKS,
) -> list[sweep.Run]:
  """The runs of the claim, seed after seed."""
  return [
    sweep.Run(
      CLAIM,
      f"{task} {way}",
      {
        "task": task,
        "way": way,
        "width": scale.before.model.width,
        "steps": scale.steps,
        "peak": scale.peak,
        "summaries": scale.problems,
      },
      seed,
      _measure(task, way, scale, folder, seed),
    )
    for seed in range(seeds)
    for task in tasks
    for way in ways.WAYS
  ]


def _measure(task, way, scale, folder, seed):
  def measure(place):
    file, codec = folder / f"{task}.jsonl", tokenizer.Bytes()
    found = [
      pair
      for pair in summaries.built_in(task, _SIZE)
      if len(pair.answer) <= _LONGEST
    ]
    if not file.exists():
      pairs.write(file, found)
    held_out = subset.evenly(
      summaries.split(found, _HELD_OUT)[1], scale.problems
    )
    rouge.check([pair.answer for pair in held_out])  # before hours of training
    data = pairs.data(file, loss_on="answer", held_out=_HELD_OUT)
    net = ways.finetuned(
      way, scale.before, scale.after(data), seed, folder, place
    )
    written = summaries.evaluate(
      mtp_jax.lay_out(net, codec.vocab),
      codec,
      held_out,
      heads=1,
      max_new=_LONGEST + 1,
      rows=min(scale.rows, scale.problems),
    )
    for name, score in written.rouge.items():
      yield sweep.Figure(scale.steps, f"{name} f1", score.f1)

  return measure
