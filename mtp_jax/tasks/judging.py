"""Verdicts on answers to programming problems: which pass their tests.

They are kept as JSONL, as the answers are (`samples`). An answer that has a
verdict there is not run again.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import code, samples

EMPTY = "the sample is empty"


def judge(
  executor: sandbox.Sandbox,
  problems: Sequence[code.Problem],
  rows: Iterable[dict[str, Any]],
  path: pathlib.Path,
) -> list[dict[str, Any]]:
  """Runs the answers that a file has no verdict of; returns their verdicts.

  Args:
    executor: where they run.
    problems: of the answers.
    rows: from `samples.draw`.
    path: JSONL. A line has the key of a sample, passed, error and the backend.

  Raises:
    ValueError: the file is damaged; names the line.
  """
  known = {problem.name: problem for problem in problems}
  rows = list(rows)
  digests = {
    samples.key(row): _digest(known[row["task_id"]], row) for row in rows
  }
  # Of another program, other tests or another backend, a verdict says nothing.
  verdicts = [
    v
    for v in samples.read(path, passed=bool, error=str)
    if (digest := digests.get(samples.key(v))) is None
    or (v.get("digest"), v.get("sandbox")) == (digest, executor.backend)
  ]
  done = {samples.key(verdict) for verdict in verdicts}
  same = collections.defaultdict(list)  # equal answers are run once
  for row in rows:
    if samples.key(row) not in done:
      same[row["task_id"], row["completion"]].append(row)
  jobs = [job for job in same if job[1].strip()]
  with samples.appending(path, verdicts) as write:

    def add(job, verdict):
      for row in same[job]:
        verdicts.append(
          _verdict(row, verdict, executor.backend, digests[samples.key(row)])
        )
        # A sandbox that failed says nothing of the answer: the next call tries
        # again.
        if sandbox.doubt(verdict.error) != sandbox.NO_VERDICT:
          write(verdicts[-1])

    for begin in range(0, len(jobs), 64):
      some = jobs[begin : begin + 64]
      found = executor.check_all([known[n].job(text) for n, text in some])
      for job, verdict in zip(some, found, strict=True):
        add(job, verdict)
    for job in same.keys() - set(jobs):
      add(job, sandbox.Verdict(False, EMPTY))
  wanted = {samples.key(row) for row in rows}
  return sorted(
    (v for v in verdicts if samples.key(v) in wanted), key=samples.key
  )


def check_solutions(
  executor: sandbox.Sandbox, problems: Sequence[code.Problem]
) -> tuple[list[code.Problem], list[str]]:
  """The problems that a known solution solves, and a line for each other.

  The solutions of a problem are tried in order. It is returned with the first
  that passes as its `solution`. Those without a solution are not tested. An
  answer of nothing must fail.
  """
  why, checked = {}, {p.name: p for p in problems}
  tried = [p for p in problems if p.solution is not None]
  while tried:
    found, again = executor.check_all([p.job(p.solution) for p in tried]), []
    for p, verdict in zip(tried, found, strict=True):
      checked[p.name] = p
      if not verdict.passed and p.others:
        first, *others = p.others
        again.append(
          dataclasses.replace(p, solution=first, others=tuple(others))
        )
      elif not verdict.passed:
        why[p.name] = f"no known solution passes: {verdict.error}"
    tried = again
  left = [p for p in checked.values() if p.name not in why]
  found = executor.check_all([p.job("") for p in left])
  for p, verdict in zip(left, found, strict=True):
    if verdict.passed:
      why[p.name] = "an empty answer passes"
  lines = [f"{name}: {reason}" for name, reason in why.items()]
  return [p for p in left if p.name not in why], lines


def _digest(problem, row) -> str:
  """Of the program that is run and its tests."""
  return samples.digest(problem.job(row["completion"]))


def _verdict(row, verdict, backend, digest) -> dict[str, Any]:
  return {name: row[name] for name in samples.KEY} | {
    "passed": verdict.passed,
    "error": verdict.error,
    "sandbox": backend,
    "digest": digest,
  }
