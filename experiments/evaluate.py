"""How well a model does on a task: pass@k of programs, and language.

  python -m experiments.evaluate --model=runs/quickstart --task=functions \\
    --output=runs/evaluated

Tasks: humaneval, mbpp, apps and codecontests read --data, the published file
as JSONL or .gz of it; functions is built in. xsum and other sets of summaries
read --data and get ROUGE; man_pages and docstrings are built in. arc_challenge
and others run in lm-evaluation-harness (pip install lm_eval).

Each programming problem is answered greedily (temperature 0) or --samples times
at each of several --temperatures, and so is each question of gsm8k. Programs
run in a sandbox (bubblewrap, or else unshare). Without one, nothing runs unless
--allow_unsandboxed_execution says so.

--output takes samples.jsonl, verdicts.jsonl, results.json and report.html, a
page with every answer. The same command goes on after an interruption, draws
nothing twice, and adds more samples, problems or temperatures. Problems with a
fault, such as a solution that fails its own tests, are listed and left out.
"""

from absl import flags

from experiments.startup import (
  continuation,
  evaluation,
  language,
  options,
  program,
)
from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import problem_files

# Each is a field of `evaluation.Request`.
_FLAGS = [
  options.define_model(),
  flags.DEFINE_integer("step", None, "Of the checkpoint; else the last."),
  flags.DEFINE_enum(
    "task",
    None,
    [*problem_files.TASKS, "functions", *language.TASKS],
    "Which problems.",
    required=True,
  ),
  options.define_path("data", None, "The task's file."),
  options.define_path("examples", None, "gsm8k's training file, for 8 shots."),
  options.define_output("Folder that takes the answers and results."),
  flags.DEFINE_string("group", None, "Only these, as introductory of APPS."),
  flags.DEFINE_integer(
    "problems", None, "Only so many, in equal steps through the file.", 1
  ),
  flags.DEFINE_list("temperatures", ["0"], "0 is greedy, one answer each."),
  flags.DEFINE_integer("samples", 10, "Answers at other temperatures.", 1),
  flags.DEFINE_list("k", ["1", "10"], "Those of pass@k, up to --samples."),
  flags.DEFINE_float("top_p", None, "Draw from this share."),
  flags.DEFINE_integer("max_new", 512, "Most tokens of an answer.", 1),
  flags.DEFINE_integer("rows", 8, "Answers that are written at once.", 1),
  flags.DEFINE_integer(
    "heads", 1, "Heads k, 1 is ordinary decoding, 0 all.", 0
  ),
  options.define_seed("Of what is drawn."),
  flags.DEFINE_bool(
    sandbox.FLAG.removeprefix("--"),
    False,
    "Where no sandbox works, let answers do all that you can do.",
  ),
]


def idle(task: str) -> list[str]:
  """The flags that do nothing for a task."""
  if task not in language.TASKS:
    return ["examples"]
  names = ["group", sandbox.FLAG.removeprefix("--")]
  if task not in language.SUMMARIES:
    names += ["max_new"]  # the benchmark says how long an answer may be
  if task not in language.SAMPLED:
    names += ["examples", "temperatures", "samples", "k", "top_p"]
  return names


def main(_: list[str]) -> None:
  """Draws and judges what is missing, then prints the table."""
  values = {flag.name: flag.value for flag in _FLAGS}
  task = values["task"]
  options.refuse_idle(idle(task), f"for --task={task}")
  if task in language.TASKS:
    return language.run(values)
  del values["examples"]
  evaluation.run(evaluation.Request(**values))


if __name__ == "__main__":
  continuation.keep_compiled_programs()
  program.start(main)
