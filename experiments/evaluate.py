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

--output takes results.json; of summaries also summaries.jsonl. Summaries and
benchmarks write at their end, and the same command begins anew. Programming
problems also have samples.jsonl, verdicts.jsonl and report.html, a page with
every answer. For them the same command goes on after an interruption, draws
nothing twice, and adds more samples, problems or temperatures. Problems with a
fault, such as one that no known solution solves, are listed and left out.
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

# Each is a field of `evaluation.Request`, but for `examples`.
_FLAGS = [
  options.define_model(),
  flags.DEFINE_integer("step", None, "Step of the checkpoint; else the last."),
  options.define_dtype("float32 matrices, the model's own activations"),
  flags.DEFINE_enum(
    "task",
    None,
    [*problem_files.TASKS, "functions", *language.TASKS],
    "What the model is measured on.",
    required=True,
  ),
  options.define_path("data", None, "The task's file."),
  options.define_path("examples", None, "gsm8k's training file, for 8 shots."),
  options.define_output("Folder that takes the answers and results."),
  flags.DEFINE_string(
    "group", None, "Only problems of this group, as introductory of APPS."
  ),
  flags.DEFINE_integer(
    "problems",
    None,
    "Only so many, in equal steps through the file; benchmarks take the first.",
    1,
  ),
  flags.DEFINE_list("temperatures", ["0"], "0 is greedy, one answer each."),
  flags.DEFINE_integer(
    "samples", 10, "Answers at each temperature above 0.", 1
  ),
  flags.DEFINE_list(
    "k", None, f"Each k of pass@k, up to --samples; else {evaluation.KS}."
  ),
  flags.DEFINE_float(
    "top_p", None, "Draw from the likeliest tokens with this probability."
  ),
  flags.DEFINE_integer("max_new", 512, "Most tokens of an answer.", 1),
  flags.DEFINE_integer("rows", 8, "Answers that are written at once.", 1),
  flags.DEFINE_integer(
    "heads", 1, "Heads to draft with; 1 is ordinary decoding, 0 takes all.", 0
  ),
  options.define_seed("Seed of the answers that are drawn."),
  flags.DEFINE_bool(
    sandbox.FLAG.removeprefix("--"),
    False,
    "Where no sandbox works, let answers do all that you can do.",
  ),
]


def main(_: list[str]) -> None:
  """Measures the model, and prints the results."""
  values = {flag.name: flag.value for flag in _FLAGS}
  language.refuse_idle(values["task"], values["temperatures"])
  if values["task"] in language.TASKS:
    return language.run(values)
  del values["examples"]
  evaluation.run(evaluation.Request(**values))


if __name__ == "__main__":
  continuation.keep_compiled_programs()
  program.start(main)
