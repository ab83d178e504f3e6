"""The tune_tree program refuses before it reads a model."""

# Its flags are the process's: other programs' tests define the same ones.
PROGRAM = """
import numpy as np
from absl import flags
from absl.testing import flagsaver
from experiments import program, tune_tree
from mtp_jax import config, workdir
from mtp_jax.data import packed, pipeline

def settings(path):
  model = config.Model(n_future=1 if str(path) == "one" else 3)
  return config.Config(model=model, data=config.Data(seq_len=32)), None

few = packed.Packed(np.zeros(99, np.uint16), np.zeros(1, int), 1.0, "", 1, {})
pipeline.pack = lambda data, codec: (few, few)
workdir.settings, workdir.load = settings, None
flags.FLAGS.mark_as_parsed()
sizes = ("0", "-1", "1", "4,abc", "4,257", "8,4,8", "2.5", "")
for case in (
  *({"sizes": s} for s in sizes), {"prompt_len": "32"}, {"workdir": "one"}, {}
):
  case = {"workdir": "run", "prompt_len": "8"} | case
  with flagsaver.as_parsed(**case):
    try:
      program.mendable(tune_tree.main)(["tune_tree"])
    except SystemExit as error:
      print(error)
"""
SIZES = (
  "has to be different integers from 2 to 256, the most tokens that a pass "
  "reads, such as 4,16"
)


def test_errors_name_the_flag(run_with_devices):
  assert run_with_devices(1, PROGRAM).splitlines() == [
    f"error: --sizes=0 {SIZES}",
    f"error: --sizes=-1 {SIZES}",
    f"error: --sizes=1 {SIZES}",
    f"error: --sizes=4,abc {SIZES}",
    f"error: --sizes=4,257 {SIZES}",
    f"error: --sizes=8,4,8 {SIZES}",
    f"error: --sizes=2.5 {SIZES}",
    f"error: --sizes= {SIZES}",
    "error: --prompt_len=32 leaves nothing to write of the run's "
    "data.seq_len=32: give at most 31",
    "error: one has one head: nothing drafts",
    "error: --prompts=32: only 3 pieces of documents have 32 tokens, but 32 "
    "were asked for: ask for fewer or shorter ones",
  ]
