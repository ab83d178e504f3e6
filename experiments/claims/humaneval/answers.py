"""Answers to HumanEval's problems, what they cost and whether they pass."""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import mtp_jax
from experiments.claims.humaneval import scales
from experiments.measure import sweep, timing
from mtp_jax.decode import autotune
from mtp_jax.decode import tree as tree_lib
from mtp_jax.evaluate import pass_at_k, sandbox
from mtp_jax.tasks import code, judging, samples, subset
from mtp_jax.train import provenance


@dataclasses.dataclass
class Work:
  """The model, the problems, and where answers are kept."""

  model: pathlib.Path
  problems: Sequence[code.Problem]
  executor: sandbox.Sandbox
  scale: scales.Scale
  folder: pathlib.Path
  seed: int

  @functools.cached_property
  def loaded(self):
    """(decoder, tokenizer, fingerprint), read only if something is decoded."""
    net, _, codec = mtp_jax.load(self.model)
    decoder = mtp_jax.lay_out(net, codec.vocab)
    return decoder, codec, provenance.fingerprint(net)

  @functools.cached_property
  def tree(self) -> tree_lib.Tree:
    """The tree with the highest expected acceptance on a few prompts.

    Where there are others, none of those that it is compared on.
    """
    decoder, codec, _ = self.loaded
    compared = {p.name for p in spread(self.problems, self.scale.compared)}
    others = [p for p in self.problems if p.name not in compared]
    some = spread(others or self.problems, self.scale.tuned)
    prompts = [[*codec.prefix, *codec.encode(p.prompt)] for p in some]
    acceptance = autotune.measure_acceptance(
      decoder, prompts, max_new=min(64, self.scale.max_new)
    )
    return tree_lib.build(acceptance, self.scale.nodes)


def spread(problems: Sequence, count: int) -> list:
  """`count` of them in equal steps; all if fewer are sound."""
  return subset.evenly(problems, min(count, len(problems)))


def runs(work: Work) -> list[sweep.Run]:
  """Greedy answers, three ways to decode some, temperatures, the oracle."""
  scale = work.scale
  drafts = {
    "ordinary": lambda: 1,
    "chain": lambda: work.loaded[0].n_future,
    "tree": lambda: work.tree,
  }
  sampled = {
    "problems": len(spread(work.problems, scale.sampled)),
    "samples": scale.samples,
    "max_new": scale.max_new,
  }

  def run(name, measure, **overrides):
    overrides |= {"model": work.model.name, "rows": scale.rows}
    return sweep.Run(
      "humaneval", name, overrides, work.seed, lambda _: measure()
    )

  return [
    run(
      "greedy",
      functools.partial(_greedy, work),
      problems=len(spread(work.problems, scale.problems)),
      max_new=scale.max_new,
    ),
    *(
      run(
        name,
        functools.partial(_compared, work, name, heads),
        problems=len(spread(work.problems, scale.compared)),
        max_new=scale.compared_new,
      )
      for name, heads in drafts.items()
    ),
    *(
      run(f"T={t:g}", functools.partial(_sampled, work, (t,)), **sampled)
      for t in scale.temperatures
    ),
    run(
      "oracle over T",
      functools.partial(_sampled, work, scale.temperatures),
      **sampled,
    ),
  ]


def _greedy(work: Work) -> Iterator[sweep.Figure]:
  """pass@1 of greedy answers by ordinary decoding."""
  problems = spread(work.problems, work.scale.problems)
  rows, minutes = _draw(work, problems, "greedy", (0.0,))
  yield from _counts(rows, minutes)
  ties = [bool(row["near_ties"]) for row in rows]
  yield sweep.Figure(0, "answers with a near-tie", sum(ties))
  passed = _passed(work, problems, rows, "greedy")
  yield from _scores(1, passed, (1,), "0")


def _compared(work: Work, name: str, heads: Callable) -> Iterator[sweep.Figure]:
  """What one way to decode takes; its texts beside ordinary decoding's."""
  problems = spread(work.problems, work.scale.compared)
  rows, minutes = _draw(
    work, problems, f"compared-{name}", (0.0,), heads(), work.scale.compared_new
  )
  yield from _counts(rows, minutes)
  written = sum(len(row["tokens"]) - 1 for row in rows)
  passes = sum(row["passes"] for row in rows)
  if passes:
    yield sweep.Figure(0, "tokens per forward", written / passes)
  ordinary = samples.read(work.folder / "compared-ordinary.jsonl")
  wanted = {row["task_id"]: row["tokens"] for row in ordinary}
  same = [row["tokens"] == wanted[row["task_id"]] for row in rows]
  yield sweep.Figure(0, "same texts", sum(same))
  passed = _passed(work, problems, rows, f"compared-{name}")
  yield from _scores(1, passed, (1,), "0")


def _sampled(
  work: Work, temperatures: tuple[float, ...]
) -> Iterator[sweep.Figure]:
  problems = spread(work.problems, work.scale.sampled)
  rows, minutes = _draw(work, problems, "sampled", temperatures)
  yield from _counts(rows, minutes)
  passed = _passed(work, problems, rows, "sampled")
  name = "oracle" if len(temperatures) > 1 else f"{temperatures[0]:g}"
  yield from _scores(work.scale.samples, passed, work.scale.ks, name)


def _counts(rows, minutes) -> Iterator[sweep.Figure]:
  if minutes:
    yield sweep.Figure(0, "minutes", minutes)
  yield sweep.Figure(0, "tokens", sum(len(row["tokens"]) for row in rows))
  empty = sum(not row["completion"].strip() for row in rows)
  yield sweep.Figure(0, "empty answers", empty)
  cut = sum(not row["ended"] for row in rows)
  yield sweep.Figure(0, "answers cut at max_new", cut)


def _draw(work, problems, name, temperatures, heads=1, max_new=None):
  """(answers, minutes that drawing took, 0 if some were there before)."""
  decoder, codec, fingerprint = work.loaded
  begin = time.monotonic()
  settings = samples.SampleSettings(
    temperatures,
    work.scale.samples,
    max_new=max_new or work.scale.max_new,
    seed=work.seed,
    rows=min(work.scale.rows, len(problems)),
    heads=heads,
    model=fingerprint,
  )
  path = work.folder / f"{name}.jsonl"
  before = len(samples.read(path))
  rows = samples.draw(decoder, codec, problems, settings, path)
  drawn = len(samples.read(path)) - before
  minutes = (time.monotonic() - begin) / 60
  return rows, minutes if drawn == len(rows) else 0.0


def _passed(work, problems, rows, name) -> dict[float, list[int]]:
  path = work.folder / f"{name}-verdicts.jsonl"
  verdicts = judging.judge(work.executor, problems, rows, path)
  return pass_at_k.count([p.name for p in problems], verdicts)


def _scores(n, passed, ks, name) -> Iterator[sweep.Figure]:
  for k, found in pass_at_k.table(n, passed, ks)[name].items():
    yield sweep.Figure(0, f"pass@{k}", found.mean)
    yield sweep.Figure(0, f"pass@{k} low", found.low)
    yield sweep.Figure(0, f"pass@{k} high", found.high)
    if name == "oracle":
      yield sweep.Figure(0, f"pass@{k} temperature", found.temperature)


def check(executor, problems) -> tuple[list[code.Problem], str]:
  """The sound problems, and a line about solutions and empty answers.

  It also says how many programs the sandbox judged per second: a solution of
  each problem, and an empty answer to each whose solution passes.
  """
  begin = time.monotonic()
  sound, bad = judging.check_solutions(executor, problems)
  speed = (len(problems) + len(sound)) / (time.monotonic() - begin)
  line = (
    f"{len(sound)} of {len(problems)} problems: the solution passes, an empty "
    f"answer does not; {speed:.1f} programs per second; the sandbox adds "
    f"{1000 * overhead(executor):.0f} ms to a program that runs alone"
  )
  return sound, "\n".join([line, *bad])


def overhead(executor: sandbox.Sandbox, rounds: int = 15) -> float:
  """Seconds that a sandbox adds to a program that does nothing.

  Medians of alternating turns; in the others it runs without protection.
  """
  boxes = {"own": executor, "none": sandbox.Sandbox("none", executor.limits)}
  calls = {
    name: functools.partial(box.check, "x = 1", "assert x == 1")
    for name, box in boxes.items()
  }
  seconds = timing.seconds_in_turns(calls, rounds)
  return statistics.median(seconds["own"]) - statistics.median(seconds["none"])
