"""The tune_tree program: what it refuses before it reads a model."""

import json

import numpy as np
import pytest

from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import tree_file

# Its flags are the process's: other programs' tests define the same ones.
PROGRAM = """
import os
import sys
import numpy as np
from absl import flags
from absl.testing import flagsaver
from experiments import tune_tree
from experiments.startup import program
from mtp_jax import config
from mtp_jax.data import packed, pipeline
from mtp_jax.interchange import folders

def settings(path):
  model = config.Model(n_future=1 if str(path) == "one" else 3)
  return config.Config(model=model, data=config.Data(seq_len=32)), None

def document(size):
  tokens = np.zeros(size, np.uint16)
  return packed.Packed(tokens, np.zeros(1, int), 1.0, "", 1, {})

few, book = document(99), document(32 * 32)
pipeline.pack = lambda data, codec: (few, few)
folders.settings = settings
folders.load = lambda path, **_: sys.exit("the model is read")
flags.FLAGS.mark_as_parsed()
sizes = ("0", "-1", "1", "4,abc", "4,257", "8,4,8", "2.5", "")
for case in (
  *({"sizes": s} for s in sizes), {"prompt_len": "32"}, {"model": "one"}, {}
):
  case = {"model": f"{sys.argv[1]}/run", "prompt_len": "8"} | case
  with flagsaver.as_parsed(**case):
    try:
      program.mendable(tune_tree.main)(["tune_tree"])
    except SystemExit as error:
      print(error)
# One text file has one held-out document.
pipeline.pack = lambda data, codec: (book, book)
with flagsaver.as_parsed(workdir=sys.argv[1], prompt_len="8"):
  try:
    tune_tree.main(["tune_tree"])
  except SystemExit as error:
    print(error)
  folders.load = lambda path, dtype: print("held in", dtype) or (None, book, 0)
  tune_tree.layout.lay_out = lambda net, vocab: None
  folders.settings = lambda path: (settings(path)[0], book)
  type(book).vocab = 7
  counted = np.array([[0.5, 0.2], [0.4, 0.1]])
  tune_tree.autotune.measure_acceptance = lambda *_, **__: counted
  replace = os.replace
  for os.replace in (None, replace):  # killed before it; not killed
    flags.FLAGS.dtype = "bfloat16" if os.replace else None
    try:
      tune_tree.main(["tune_tree"])
    except TypeError:
      print((tune_tree._WORKDIR.value / "tree.json").read_text())
"""
SIZES = (
  "has to be different integers from 2 to 256, the most tokens that a pass "
  "reads, such as 4,16"
)


def test_errors_name_the_flag_and_one_document_is_enough(
  run_with_devices, tmp_path
):
  (tmp_path / "tree.json").write_text("the trees of before")
  lines = run_with_devices(1, PROGRAM, str(tmp_path)).splitlines()
  held = [line for line in lines if line.startswith("held in ")]
  assert held == ["held in float32", "held in bfloat16"]
  lines = [line for line in lines if line not in held]
  assert lines[:13] == [
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
    "were asked for: ask for at most 3, or hold out more or longer documents",
    "the model is read",
    "the trees of before",
  ]
  assert lines[-1] == str(tmp_path / "tree.json")
  found = json.loads((tmp_path / "tree.json").read_text())
  assert found["acceptance"] == [[0.5, 0.2], [0.4, 0.1]]


def test_trees_come_back_by_their_size(tmp_path):
  path = tmp_path / "tree.json"
  chances = np.array([[0.5, 0.2, 0.1], [0.4, 0.1, 0.1]])
  path.write_text(json.dumps(tree_file.build(chances, [3, 5])))
  assert tree_file.read(path, 5) == tree_lib.build(chances, 5)
  assert tree_file.read(path, 3) == tree_lib.build(chances, 3)
  with pytest.raises(ValueError, match="^no tree of 4 nodes in .*tree.json$"):
    tree_file.read(path, 4)
  with pytest.raises(ValueError, match="^no tree of 4 nodes in .*none.json$"):
    tree_file.read(tmp_path / "none.json", 4)
  for damage in ("{", "[]", '{"trees": {"4": {}}}', '{"trees": 3}'):
    path.write_text(damage)
    with pytest.raises(ValueError, match="tree.json is damaged"):
      tree_file.read(path, 4)
