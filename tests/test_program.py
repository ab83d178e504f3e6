"""Programs as a user types them: settings, and errors in one line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from conftest import ROOT

from experiments import program

CONFIG = ["--config=configs/quickstart.py"]


def call(*arguments, module="experiments.train"):
  done = subprocess.run(
    [sys.executable, "-m", module, *arguments],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  "flag, line",
  [
    (
      "--config.model.n_futrue=4",
      "error: config has no field 'model.n_futrue'; did you mean "
      "model.n_future",
    ),
    ("--config.modle.width=4", "error: config has no field 'modle.width'"),
    ("--config.model.width=64.5", "flag --config.model.width=64.5: invalid"),
    (
      "--config.model.kv_heads=3",
      "error: model.attn_heads 4 is not divisible by model.kv_heads 3",
    ),
    (
      "--config.data.source=text",
      "error: data.source 'text' needs data.path",
    ),
    (
      "--config.mesh.data=3",
      "error: mesh.data=3 x mesh.model=1 does not use exactly the 1 devices",
    ),
    ("--profile=9", "error: --profile=9 is not START:COUNT, such as 100:5"),
    (
      "--profile=9000:2",
      "error: profile starts with step 9000, but the run ends with step",
    ),
    ("--heartbeat_s=0", "flag --heartbeat_s=0: 0 is not a positive"),
  ],
)
def test_errors_are_a_line(flag, line, tmp_path):
  code, out, err = call(*CONFIG, f"--workdir={tmp_path / 'w'}", flag)
  assert code == 1
  assert line in err
  assert "Traceback" not in err
  assert not (tmp_path / "w" / "config.json").exists()


def test_flags_reach_the_run(tmp_path):
  corpus = tmp_path / "c.jsonl"
  rows = [json.dumps({"text": f"line {i}\n" * 9}) for i in range(60)]
  corpus.write_text("\n".join(rows))
  sizes = "width=16 mlp=24 layers=1 n_future=2 attn_heads=2 kv_heads=1".split()
  code, out, err = call(
    *CONFIG,
    f"--workdir={tmp_path / 'w'}",
    *(f"--config.model.{size}" for size in sizes),
    "--config.train.head_weights=(1.0, 0.5)",
    "--config.train.steps=3",
    "--config.train.loss=formula",
    "--config.optim.warmup=1",
    "--config.data.source=jsonl",
    f"--config.data.path={corpus}",
    f"--config.data.cache={tmp_path / 'cache'}",
    "--config.data.held_out=0.2",
    "--config.data.seq_len=19",
    "--config.data.batch=2",
    "--profile=2:1",
  )
  assert code == 0, err
  assert "step 3/3" in out and "held out at step 3" in out
  found = json.loads((tmp_path / "w/config.json").read_text())
  assert found["model"]["n_future"] == 2
  assert found["train"]["head_weights"] == [1.0, 0.5]
  assert found["train"]["loss"] == "formula"
  assert list((tmp_path / "w/profile").rglob("*.xplane.pb"))


def test_a_path_flag_knows_the_home_folder(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  values = flags.FlagValues()
  program.define_path("workdir", "~/runs", "text", flag_values=values)
  program.define_path("output", None, "text", flag_values=values)
  values(["train"])
  assert values.workdir == pathlib.Path("/home/ada/runs")
  assert values.output is None
  values(["train", "--workdir=~", "--output=a/~b"])
  assert values.workdir == pathlib.Path("/home/ada")
  assert values.output == pathlib.Path("a/~b")
  for empty in ("", " "):
    with pytest.raises(flags.IllegalFlagValueError, match="path is empty"):
      values(["train", f"--output={empty}"])
  with pytest.raises(flags.IllegalFlagValueError, match="home directory"):
    values(["train", "--output=~no-such-user/x"])


def test_every_flag_that_names_a_path_is_one():
  """By what it is called; the programs' flags clash, so by their source."""
  named = re.compile(
    r'(\S+)\(\s*"(\w*dir|output|path|json|results|\w+_file|folder)"'
  )
  found = []
  for file in (ROOT / "experiments").rglob("*.py"):
    for how, name in named.findall(file.read_text()):
      if "DEFINE" in how or "define" in how:
        assert how == "program.define_path", (file, name)
        found.append(name)
  assert len(found) >= 15 and {"workdir", "output", "json"} < set(found)
