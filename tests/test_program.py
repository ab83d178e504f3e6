"""Programs: clear errors before any work, help, and where output goes."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import sys
import tomllib

import jax
import pytest
from absl import flags
from conftest import ROOT

from experiments.startup import options, program

CONFIG = ["--config=configs/quickstart.py"]


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
      "error: --config.model.attn_heads 4 is not divisible by "
      "--config.model.kv_heads 3",
    ),
    (
      "--config.data.source=text",
      "error: --config.data.source 'text' needs --config.data.path",
    ),
    (
      "--config.mesh.data=3",
      "error: --config.mesh.data=3 x --config.mesh.model=1 does not use "
      "exactly the 1 devices",
    ),
    ("--profile=9", "error: --profile=9 is not START:COUNT, such as 100:5"),
    (
      "--profile=9000:2",
      "error: profile starts with step 9000, but the run ends with step",
    ),
    ("--heartbeat_s=0", "flag --heartbeat_s=0: 0 is not a positive"),
    ("--config.model.n_future=abc", "error: flag --config.model.n_future=abc"),
    ("--config.model.n_future", "error: Missing value for flag --config.model"),
    ("--config.model.check=1", "error: config has no field 'model.check'"),
    ("--noconfig.model.msk", "error: config has no field 'model.msk'; did you"),
    ("--config.model=3", "error: --config.model is a section; set a field"),
    ("--wrokdir=x", "flag 'wrokdir'. Did you mean: workdir"),
    ("--workdir=", "error: flag --workdir=: a path is empty"),
    ("--flagfile=nowhere", "error: ERROR:: Unable to open flagfile"),
    ("stray", "error: unexpected arguments: ['stray']"),
  ],
)
def test_errors_are_a_line(call, flag, line, tmp_path):
  code, out, err = call(*CONFIG, f"--workdir={tmp_path / 'w'}", flag)
  assert code == 1
  assert line in err and err.count("\n") == 1
  assert out == ""
  assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["--workdir=w"], "error: --config is required: File with get_config()"),
    (CONFIG, "error: --workdir is required: Takes all that a run writes."),
    (["--config.model.width=8"], "error: --config.model.width changes a conf"),
    (["--config.model.width=8", *CONFIG], "name its file before, as"),
    (["--config"], "error: Missing value for flag --config"),
    (["--config="], "error: --config is empty; try"),
    (["--config=~nobody9/c.py"], "error: path '~nobody9/c.py': Could not det"),
    (["--config=configs"], "error: --config=configs is a folder; name a file"),
    (
      ["--config=configs/quikstart.py"],
      "error: there is no config file configs/quikstart.py; did you mean "
      "configs/quickstart.py?",
    ),
  ],
)
def test_what_is_missing_is_a_line(call, arguments, line):
  code, out, err = call(*arguments)
  assert (code, out, err.count("\n")) == (1, "", 1)
  assert line in err


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["train", "--num_processes=2"], "need --coordinator, host:port of"),
    (["train", "--process_id=0"], "need --coordinator, host:port of"),
    (["train", "--coordinator=x"], "coordinator 'x' is not host:port"),
    (["plan", "--topology=v5e:0x2"], "no TPU slice 'v5e:0x2': Known forms"),
    (["plan", "--topology=v5e"], "no TPU slice 'v5e': Known forms"),
    (["plan", "--compiler_options=abc"], "'abc' is not name=value"),
    (["plan", "--decode_batch=0"], "flag --decode_batch=0: 0 is not"),
    (["plan", "--cache_len=-4"], "flag --cache_len=-4: -4 is not"),
    (["plan", "--json=configs"], "configs is a folder; name a file in it"),
    (["plan", "--json=README.md/x"], "README.md is a file; name a folder"),
    (["plan", "--cache_len=9"], "--cache_len does nothing without --decode"),
    (["plan", "--decode_batch=9"], "--decode_batch does nothing without --d"),
    (
      ["plan", "--model=nowhere", "--config.model.width=32"],
      "--config.model.width does nothing with --model, whose shape is planned",
    ),
    (
      ["train", "--init_heads=fresh"],
      "--init_heads does nothing without --init",
    ),
  ],
)
def test_bad_flags_are_told_before_the_work(call, arguments, line, tmp_path):
  name, *more = arguments
  given = {"train": f"--workdir={tmp_path / 'w'}", "plan": "--topology=v5e:2x2"}
  code, out, err = call(
    *CONFIG, given[name], *more, module=f"experiments.{name}"
  )
  assert (code, out, err.count("\n")) == (1, "", 1)
  assert line in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["humaneval", "--model=nowhere"], "there is no run in nowhere"),
    (["heads_for_a_model", "--model=nowhere"], "there is no run in nowhere"),
    (["summarisation", "--tasks=x"], "--tasks=x: choose of man_pages, docs"),
    (["finetuning", "--seeds=0"], "flag --seeds=0: 0 is not a positive"),
    (["self_speculation", "--minutes=-1"], "flag --minutes=-1: -1.0 is not"),
    (["best_n", "--minutes=nan"], "minutes=nan must be a number"),
  ],
)
def test_a_claim_refuses_before_the_work(call, arguments, line, tmp_path):
  name, *more = arguments
  code, out, err = call(
    *more, f"--output={tmp_path / 'w'}", module=f"experiments.claims.{name}"
  )
  assert (code, out, err.count("\n")) == (1, "", 1)
  assert line in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull"])
def test_help_is_no_error(call, flag):
  code, out, err = call(flag)
  assert (code, err) == (0, "")
  assert out.startswith("Trains a model, or resumes its training.\n")
  for name in ("config", "workdir", "profile", "num_processes"):
    assert f"  --{name}: " in out
  assert ("--verbosity" in out) == (flag == "--helpfull")


@pytest.mark.slow
def test_flags_reach_the_run(call, tmp_path):
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


FINISHED = """
import types
from experiments.startup import program
from mtp_jax.train import loop
loop.fit = lambda cfg, *_, **__: types.SimpleNamespace(step=cfg.train.steps)
from experiments import train
program.start(train.main)
"""


def test_a_finished_run_names_programs_that_can_follow(call, tmp_path):
  """Whatever the corpus: no prompt; and no trees for one head."""
  (tmp_path / "finished.py").write_text(FINISHED)
  commands = [
    f"  python -m experiments.{name} '--workdir={tmp_path}/a b'"
    for name in ("tune_tree", "generate")
  ]
  for heads, want in ((1, commands[1:]), (2, commands)):
    code, out, err = call(
      *CONFIG,
      f"--workdir={tmp_path / 'a b'}",
      f"--config.model.n_future={heads}",
      "--config.train.head_weights=()",
      module=f"{tmp_path}/finished.py",
    )
    assert code == 0, err
    assert [x for x in out.splitlines() if x.startswith(" ")] == want


FULL = """
import os
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
"""


CLOSED = """
import sys
from experiments.startup import program
sys.stdout = sys.stderr = None
program.start(lambda _: sys.exit(3 + sys.stdout.isatty()))
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_output_fails_a_program_but_no_finished_run(
  call, tmp_path, monkeypatch
):
  (tmp_path / "finished.py").write_text(FULL + FINISHED)
  found = call(
    *CONFIG,
    f"--workdir={tmp_path / 'w'}",
    module=f"{tmp_path}/finished.py",
  )
  assert found == (0, "", "")
  stream = open("/dev/full", "w", encoding="utf-8")
  monkeypatch.setattr(sys, "stdout", stream)
  with pytest.raises(SystemExit, match="^error: standard output cannot be wri"):
    program.mendable(lambda _: print("text", flush=True))([])
  with contextlib.suppress(OSError):
    stream.close()


def test_too_little_memory_is_a_line():
  def run(error):
    def main(_):
      raise error

    program.mendable(main)([])

  gone = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes."
  )
  line = "^error: not enough memory .*Out of memory allocating 9 bytes.*: ask f"
  with pytest.raises(SystemExit, match=line):
    run(gone)
  with pytest.raises(SystemExit, match="^error: not enough memory .Memo"):
    run(MemoryError())
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    run(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


def test_an_output_that_is_closed_takes_nothing(call, tmp_path):
  (tmp_path / "closed.py").write_text(CLOSED)
  assert call(module=f"{tmp_path}/closed.py") == (3, "", "")


def test_a_console_script_is_its_program(call, monkeypatch):
  with (ROOT / "pyproject.toml").open("rb") as file:
    scripts = tomllib.load(file)["project"]["scripts"]
  names = (
    "train generate tune_tree train_tokenizer convert evaluate plan".split()
  )
  ran = []
  monkeypatch.setattr(
    program.runpy, "run_module", lambda name, **_: ran.append(name)
  )
  for script, function in scripts.items():
    module, _, name = function.partition(":")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{script}", "--help"])
    getattr(importlib.import_module(module), name)()
  assert ran == [f"experiments.{name}" for name in names]
  for module in ran:
    code, out, err = call("--help", module=module)
    assert (code, err) == (0, "") and f"python -m {module} " in out


def test_a_path_flag_knows_the_home_folder(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  values = flags.FlagValues()
  options.define_path("workdir", "~/runs", "text", flag_values=values)
  options.define_path("output", None, "text", flag_values=values)
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
        assert how.split(".")[-1] == "define_path", (file, name)
        found.append(name)
  assert len(found) >= 8 and {"workdir", "output", "json"} < set(found)
  assert found.count("output") == 1  # in `options.define_output`
