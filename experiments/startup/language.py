"""`experiments.evaluate` on summaries and on benchmarks of language."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import mtp_jax
from configs import harness as harness_tasks
from experiments.measure import study
from experiments.startup import evaluation, options
from mtp_jax.decode import checks
from mtp_jax.evaluate import harness, rouge, sandbox
from mtp_jax.interchange import folders
from mtp_jax.tasks import pairs, samples, subset, summaries
from mtp_jax.train import lock

SUMMARIES = (*summaries.BUILT_IN, *summaries.SETS)
TASKS = (*SUMMARIES, *harness_tasks.NAMES)
SAMPLED = ("gsm8k",)  # tasks with --samples at each of --temperatures
_SIZE = 4096  # characters of a text to summarise
_LENGTH = 2048  # tokens that a benchmark's model reads at once
_HELD_OUT = 0.1  # of the built-in pairs


def refuse_idle(task: str, temperatures: Sequence[str]) -> None:
  """Refuses flags of `experiments.evaluate` that are given and do nothing.

  Args:
    task: of TASKS, or a task of programming problems.
    temperatures: the value of --temperatures.

  Raises:
    ValueError: the first of them, or a temperature is no number.
  """
  names = ["examples"]
  if task in TASKS:
    names = ["group", sandbox.FLAG.removeprefix("--")]
    if task not in SUMMARIES:
      names += ["max_new"]  # the benchmark says how long an answer may be
    if task not in SAMPLED:
      names += ["examples", "temperatures", "samples", "k", "top_p", "seed"]
  options.refuse_idle(names, f"for --task={task}")
  numbers = evaluation.read_numbers("temperatures", temperatures, float)
  if set(numbers) == {0.0}:
    options.refuse_idle(
      ["samples", "k", "top_p", "seed"],
      "at temperature 0, which has one answer (--temperatures asks for more)",
    )


def run(values: dict[str, Any]) -> None:
  """Measures a model on a task of TASKS.

  Args:
    values: of the program's flags, by name. `output` takes results.json and,
      for summaries, summaries.jsonl with every text. Of benchmarks the results
      have `contexts_cut`: requests, at all temperatures, of whose context the
      model read the end alone.

  Raises:
    ValueError: what the values ask for cannot be done. It is raised before the
      model is read.
    checkpoints.CheckpointError: another process writes to `output`.
  """
  task, output = values["task"], values["output"]
  if task in summaries.BUILT_IN and values["data"] is not None:
    raise ValueError(f"--task={task} is built in: leave out --data")
  if task not in summaries.BUILT_IN and values["data"] is None:
    raise ValueError(f"--task={task} needs --data=FILE, a JSONL file")
  if task in SAMPLED and values["examples"] is None:
    raise ValueError(f"--task={task} needs --examples=FILE, its training split")
  checks.max_new(values["max_new"])
  checks.seed(values["seed"])
  heads = evaluation.check_heads(
    values["workdir"], values["step"], values["heads"]
  )
  options.make_room(output / "results.json")
  work = _pairs(values) if task in SUMMARIES else _tasks(values)
  with lock.exclusive(output):
    found = _measured(heads, work, values)
    study.write_json(
      output / "results.json",
      study.provenance(values["seed"]) | {"task": task} | found,
    )
  print(json.dumps(found, indent=1, default=float))


def _measured(heads, work, values) -> dict[str, Any]:
  """What the model is found to do; `work` is of `_pairs` or `_tasks`."""
  net, cfg, codec = mtp_jax.load(
    values["workdir"], step=values["step"], dtype=values["dtype"]
  )
  decoder, dtype = mtp_jax.lay_out(net, codec.vocab), {"dtype": net.cfg.dtype}
  if values["task"] in SUMMARIES:
    return dtype | _summaries(decoder, codec, heads, work, values)
  is_workdir = folders.kind(values["workdir"]) == "workdir"
  lm = harness.adapter(
    decoder,
    codec,
    # Of other folders' models it is not known how far they were trained.
    length=cfg.data.seq_len if is_workdir else _LENGTH,
    rows=values["rows"],
    heads=heads,
    seed=values["seed"],
  )
  found = _harness(lm, work, values)
  return dtype | found | {"contexts_cut": lm.contexts_cut}


def _pairs(values) -> list[pairs.Pair]:
  """The texts to summarise, with the summaries of others."""
  task = values["task"]
  if task in summaries.BUILT_IN:
    found = summaries.split(summaries.built_in(task, _SIZE), _HELD_OUT)[1]
  else:
    found = list(summaries.read(values["data"], summaries.SETS[task], _SIZE))
  if values["problems"] is not None:
    found = subset.evenly(found, values["problems"])
  rouge.check([pair.answer for pair in found], _words(task))  # raises
  return found


def _words(task: str) -> rouge.Words:
  """What ROUGE counts in the summaries of a task."""
  return summaries.SETS[task].words if task in summaries.SETS else rouge.words


def _summaries(decoder, codec, heads, found, values) -> dict[str, Any]:
  words = _words(values["task"])
  written = summaries.evaluate(
    decoder,
    codec,
    found,
    heads=heads,
    max_new=values["max_new"],
    rows=values["rows"],
    words=words,
  )
  lines = [
    json.dumps(one._asdict() | {"summary": text})
    for one, text in zip(found, written.texts, strict=True)
  ]
  file: pathlib.Path = values["output"] / "summaries.jsonl"
  file.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return {
    "summaries": len(found),
    "tokens_per_forward": written.tokens_per_forward,
    "words": words.__name__,
    "rouge": {name: s._asdict() for name, s in written.rouge.items()},
  }


def _tasks(values) -> dict[float, dict]:
  """lm-evaluation-harness's task by temperature, 0 for greedy answers.

  Raises:
    ValueError: a file or a flag is bad, or the harness is missing.
  """
  task = harness_tasks.load(
    values["task"], values["data"], train=values["examples"]
  )
  harness.base_class()  # raises
  if values["task"] not in SAMPLED:
    return {0.0: task}
  count = values["samples"]
  ks = evaluation.read_ks(values["k"], count)
  temperatures = evaluation.read_numbers(
    "temperatures", values["temperatures"], float
  )
  samples.SampleSettings(
    tuple(temperatures), count, top_p=values["top_p"], seed=values["seed"]
  ).check()
  return {
    t: harness_tasks.sampled(
      task, count, ks, temperature=t, top_p=values["top_p"]
    )
    if t
    else task
    for t in temperatures
  }


def _harness(lm, tasks, values) -> dict[str, Any]:
  # An extra; `_tasks` raises where it is missing.
  import lm_eval
  from lm_eval import tasks as own_tasks

  # Without the harness's own tasks, whose thousands of files it would read.
  manager = own_tasks.TaskManager(include_defaults=False)
  correct = {}
  for temperature, task in tasks.items():
    found = lm_eval.simple_evaluate(
      model=lm,
      tasks=[task],
      task_manager=manager,
      limit=values["problems"],
      log_samples=True,
    )
    (scores,), (rows,) = found["results"].values(), found["samples"].values()
    if values["task"] not in SAMPLED:
      return {"scores": scores}
    metric = "correct" if temperature else "exact_match"
    if missing := sum(metric not in row for row in rows):
      raise ValueError(
        f"lm_eval gave {missing} of {len(rows)} answers no {metric!r}: its "
        "version differs from those that requirements-eval.txt names"
      )
    correct[temperature] = [round(row[metric]) for row in rows]
  count = values["samples"]
  return {
    "problems": len(rows),
    "samples": count,
    "pass_at_k": evaluation.estimates(
      correct, count, evaluation.read_ks(values["k"], count)
    ),
  }
