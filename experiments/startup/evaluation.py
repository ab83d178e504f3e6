"""Programming problems that a model answers: what `experiments.evaluate` does.

In order: the problems are read and their own solutions tested, the answers
drawn, the answers run, and the results written.
"""

import dataclasses
import html
import pathlib
from collections.abc import Sequence

from experiments.measure import study
from experiments.startup import options, terminal
from mtp_jax.decode import layout
from mtp_jax.evaluate import pass_at_k, sandbox
from mtp_jax.interchange import folders
from mtp_jax.tasks import (
  code,
  functions,
  judging,
  problem_files,
  samples,
  subset,
)
from mtp_jax.train import lock, logs, provenance

KS = (1, 10)  # of pass@k, where --k is not given
_FUNCTIONS = 100  # problems of the built-in task


@dataclasses.dataclass(frozen=True)
class Request:
  """What to evaluate, and how: the flags of `experiments.evaluate`."""

  workdir: pathlib.Path  # any folder that `mtp_jax.load` reads
  step: int | None
  dtype: str | None  # of `folders.load`
  task: str
  data: pathlib.Path | None
  output: pathlib.Path
  group: str | None
  problems: int | None
  temperatures: list[str]
  samples: int
  k: list[str] | None
  top_p: float | None
  max_new: int
  rows: int
  heads: int
  seed: int
  allow_unsandboxed_execution: bool


def run(request: Request) -> None:
  """Writes the results into `request.output`, and prints them.

  Raises:
    ValueError: what the request asks for cannot be done. It is raised before
      the model is read.
    checkpoints.CheckpointError: another process writes to `request.output`.
  """
  settings, ks = _settings(request), read_ks(request.k, request.samples)
  backend = sandbox.find(
    allow_unsandboxed_execution=request.allow_unsandboxed_execution
  )
  found = read(request)
  heads = check_heads(request.workdir, request.step, request.heads)
  settings = dataclasses.replace(settings, heads=heads)
  options.make_room(request.output / "results.json")
  # Two processes would each replace the files that the other one appends to.
  with lock.exclusive(request.output):
    _run(request, found, settings, ks, backend)


def _run(request, found, settings, ks, backend) -> None:
  """`run`, once the request is checked and the folder is its own."""
  executor = sandbox.Sandbox(backend)
  problems, unsound = judging.check_solutions(executor, found.problems)
  left_out = found.bad + unsound
  for line in left_out:
    terminal.note(f"left out: {line}\n")
  if not problems:
    raise ValueError("no problem is sound")
  terminal.note(f"{len(problems)} problems; sandbox: {backend}\n")

  net, _, codec = folders.load(
    request.workdir, request.step, dtype=request.dtype
  )
  decoder = layout.lay_out(net, codec.vocab)
  # The same arrays are another model where activations have another dtype.
  name, dtype = provenance.fingerprint(net), net.cfg.dtype
  if dtype != "float32":
    name += f" in {dtype}"
  settings = dataclasses.replace(settings, model=name)
  del net  # the decoder holds copies of its layers
  folder = request.output
  path = folder / "samples.jsonl"
  rows = samples.draw(decoder, codec, problems, settings, path)
  verdicts = judging.judge(executor, problems, rows, folder / "verdicts.jsonl")
  doubts = [sandbox.doubt(verdict["error"]) for verdict in verdicts]
  result = study.provenance(request.seed) | {
    "task": request.task,
    "model": str(request.workdir),
    "dtype": dtype,
    "sandbox": backend,
    "problems": len(problems),
    "left_out": left_out,
    "samples": len(rows),
    "without_a_verdict": doubts.count(sandbox.NO_VERDICT),
    "out_of_time": doubts.count(sandbox.OUT_OF_TIME),
    "empty": sum(not row["completion"].strip() for row in rows),
    "cut_at_max_new": sum(not row["ended"] for row in rows),
    "with_a_near_tie": sum(row["near_ties"] > 0 for row in rows),
    "tokens_per_forward": _tokens_per_forward(rows),
    "pass_at_k": scores(problems, verdicts, settings, ks),
  }
  study.write_json(folder / "results.json", result)
  logs.write_whole(
    folder / "report.html", page(request.task, problems, rows, verdicts)
  )
  show(result)
  print(folder / "report.html")


def check_heads(workdir: pathlib.Path, step: int | None, asked: int) -> int:
  """How many heads to draft with: `asked`, or all that can if it is 0.

  Raises:
    ValueError: the model, which is not read, has fewer.
  """
  most = folders.settings(workdir, step)[0].model.drafting
  if asked > most:
    raise ValueError(f"--heads={asked}: the model can draft with {most}")
  return asked or most


def read(request: Request) -> problem_files.File:
  """The problems that are asked for.

  Raises:
    ValueError: there are none or too few, or --data is missing or not wanted.
  """
  if request.task == "functions":
    if request.data is not None or request.group is not None:
      raise ValueError(
        "--task=functions is built in: leave out --data, --group"
      )
    count = request.problems or _FUNCTIONS
    return problem_files.File(functions.problems(count), [])
  if request.data is None:
    raise ValueError(f"--data is required: the file of {request.task}")
  found = problem_files.read(request.task, request.data, request.group)
  if request.problems is None:
    return found
  some = subset.evenly(found.problems, request.problems)
  return problem_files.File(some, found.bad)


def scores(
  problems: Sequence[code.Problem],
  verdicts: Sequence[dict],
  settings: samples.SampleSettings,
  ks: Sequence[int],
) -> dict[str, dict[str, dict[str, float]]]:
  """pass@k by temperature; the oracle is over those above 0."""
  passed = pass_at_k.count([p.name for p in problems], verdicts)
  counts = {t: passed[t] for t in settings.temperatures}
  return estimates(counts, settings.count, ks)


def estimates(
  correct: dict[float, Sequence[int]], samples: int, ks: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
  """pass@k by temperature from correct samples of each problem.

  Args:
    correct: by temperature; at 0 there is one sample.
    samples: of each problem at other temperatures.
    ks: up to `samples`.
  """
  found, drawn = {}, {t: counts for t, counts in correct.items() if t}
  if 0.0 in correct:
    found["0"] = pass_at_k.table(1, {0.0: correct[0.0]}, [1])["0"]
  if drawn:
    found |= pass_at_k.table(samples, drawn, ks)
  return {
    name: {str(k): estimate._asdict() for k, estimate in row.items()}
    for name, row in found.items()
  }


def show(result: dict) -> None:
  """Prints the table of pass@k, and what else one has to know of it."""
  rows = result["pass_at_k"]
  ks = sorted({int(k) for row in rows.values() for k in row})
  terminal.show_table(
    f"{result['task']}: {result['problems']} problems, 90 % intervals",
    ["temperature", *(f"pass@{k}" for k in ks)],
    (
      [name, *(_cell(row.get(str(k))) for k in ks)]
      for name, row in rows.items()
    ),
  )
  print(
    f"{result['samples']} answers: {result['empty']} empty, "
    f"{result['cut_at_max_new']} cut at the most tokens, "
    f"{result['with_a_near_tie']} with a token that rounding might change; "
    f"{len(result['left_out'])} problems left out"
  )
  if result["without_a_verdict"] or result["out_of_time"]:
    print(
      f"{result['out_of_time']} answers out of time and "
      f"{result['without_a_verdict']} without a verdict count as wrong: a busy "
      "machine may be the reason"
    )
  if result["sandbox"] == "none":
    print("the answers ran WITHOUT a sandbox")


def page(
  task: str,
  problems: Sequence[code.Problem],
  rows: Sequence[dict],
  verdicts: Sequence[dict],
) -> str:
  """An HTML page: each problem, its answers and their verdicts."""
  answers = {}
  for row, verdict in zip(rows, verdicts, strict=True):
    answers.setdefault(row["task_id"], []).append((row, verdict))
  parts = [f"<!doctype html><meta charset=utf-8><title>{task}</title>{_STYLE}"]
  for problem in problems:
    some = answers.get(problem.name, [])
    passed = sum(verdict["passed"] for _, verdict in some)
    parts.append(
      f"<h2>{html.escape(problem.name)}: {passed} of {len(some)}</h2>"
      f"<details><summary>what the model read</summary>"
      f"<pre>{html.escape(problem.prompt)}</pre></details>"
    )
    for row, verdict in some:
      outcome = "passed" if verdict["passed"] else html.escape(verdict["error"])
      kind = "right" if verdict["passed"] else "wrong"
      parts.append(
        f"<p class={kind}>temperature {row['temperature']:g}, sample "
        f"{row['sample']}, {len(row['tokens'])} tokens, "
        f"{sum(row['logprobs']):.1f} nats: {outcome}</p>"
        f"<pre>{html.escape(row['completion'])}</pre>"
      )
  return "\n".join(parts) + "\n"


_STYLE = (
  "<style>body{max-width:60em;margin:2em auto;font-family:sans-serif}"
  "pre{background:#f4f4f4;padding:.5em;overflow:auto}"
  ".right{color:#060}.wrong{color:#900}</style>"
)


def _settings(request: Request) -> samples.SampleSettings:
  settings = samples.SampleSettings(
    temperatures=read_numbers("temperatures", request.temperatures, float),
    count=request.samples,
    max_new=request.max_new,
    top_p=request.top_p,
    seed=request.seed,
    rows=request.rows,
  )
  settings.check()
  return settings


def read_ks(texts: Sequence[str] | None, samples: int) -> list[int]:
  """The k's of --k; where it is not given, those of KS up to `samples`.

  Raises:
    ValueError: a k that is given is not in 1..`samples`, or none is given.
  """
  if texts is None:
    return [k for k in KS if k <= samples]
  ks = list(read_numbers("k", texts, int))
  if not ks or min(ks) < 1 or max(ks) > samples:
    raise ValueError(
      f"--k={','.join(texts)} with --samples={samples}: give k's from 1 to "
      f"{samples}, or more samples"
    )
  return ks


def read_numbers(name: str, texts: Sequence[str], kind: type) -> tuple:
  """The numbers of a flag; ValueError names it."""
  try:
    return tuple(kind(text) for text in texts)
  except ValueError:
    raise ValueError(
      f"--{name}={','.join(texts)}: give numbers, such as 0.2,0.8 or 1,10"
    ) from None


def _tokens_per_forward(rows) -> float:
  """New tokens but each answer's first, over passes; nan without any."""
  passes = sum(row["passes"] for row in rows)
  written = sum(len(row["tokens"]) - 1 for row in rows)
  return written / passes if passes else float("nan")


def _cell(estimate) -> str:
  if estimate is None:
    return ""
  low, high = estimate["low"], estimate["high"]
  return f"{estimate['mean']:.1%} ({low:.1%} to {high:.1%})"
