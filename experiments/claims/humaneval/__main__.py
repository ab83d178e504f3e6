"""Answers HumanEval with a model that has heads, and counts what passes.

  python -m experiments.claims.humaneval --scale=cpu --output=runs/humaneval \\
    --model=runs/heads_for_a_model/files/model

Greedy answers are written by ordinary decoding, in chains and in trees: the
same texts, in fewer passes. Then answers are sampled, for pass@k. Samples and
verdicts are kept in --output; what is there is not made again.
"""

import jax
from absl import flags

from experiments.claims.humaneval import answers, report, scales
from experiments.measure import study, sweep, wheels
from experiments.startup import options, program
from mtp_jax.evaluate import sandbox
from mtp_jax.interchange import folders
from mtp_jax.tasks import problem_files

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is answered.")
_SEED = options.define_seed("Of what is drawn.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MINUTES = options.define_minutes()
_MODEL = options.define_model()
_DATA = options.define_path("data", None, "HumanEval.jsonl.gz; else fetched.")
_ALLOW = flags.DEFINE_bool(
  sandbox.FLAG.removeprefix("--"), False, "Run answers without any protection."
)


def main(_: list[str]) -> None:
  """Draws and judges what is missing, and prints the table."""
  folder = _OUTPUT.value
  folders.settings(_MODEL.value)  # refuses what is no model before the work
  backend = sandbox.find(allow_unsandboxed_execution=_ALLOW.value)
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
  found = problem_files.read(
    "humaneval", _DATA.value or wheels.humaneval(folder)
  )
  executor = sandbox.Sandbox(backend)
  sound, lines = answers.check(executor, found.problems)
  print("\n".join([*found.bad, lines, f"sandbox: {backend}"]), flush=True)
  study.write_json(folder / "machine.json", study.provenance(_SEED.value))
  work = answers.Work(
    _MODEL.value,
    sound,
    executor,
    scales.SCALES[_SCALE.value],
    folder,
    _SEED.value,
  )
  runs = answers.runs(work)
  sweep.run_and_show(runs, folder, _MINUTES.value, report.section)


if __name__ == "__main__":
  program.start(main)
