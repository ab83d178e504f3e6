"""Programs as a user types them: settings, and errors in one line."""

import contextlib
import importlib
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from absl import flags
from conftest import ROOT

from experiments.startup import config_file, options, program
from mtp_jax import config

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
      "error: model.attn_heads 2 is not divisible by model.kv_heads 3",
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
    (["plan", "--json=README.md/x"], "cannot make README.md: File exists"),
  ],
)
def test_bad_flags_are_told_before_the_work(call, arguments, line, tmp_path):
  name, flag = arguments
  given = {"train": f"--workdir={tmp_path / 'w'}", "plan": "--topology=v5e:2x2"}
  code, out, err = call(
    *CONFIG, given[name], flag, module=f"experiments.{name}"
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


RETURN = "def get_config():\n  return config.Config()\n"
IMPORT = "from mtp_jax import config\n"


@pytest.mark.parametrize(
  "text, line",
  [
    ("def f(:\n", "run.py, line 1: invalid syntax"),
    ("x = '\xe9'", "run.py, line 1: (unicode error) 'utf-8' codec can't dec"),
    ("\nx = 1 / 0\n", "run.py, line 2: ZeroDivisionError: division by zero"),
    ("import flox\n", "run.py, line 1: ModuleNotFoundError: No module named"),
    ("import sys\nsys.exit(3)\n", "run.py, line 2: SystemExit: 3"),
    ("", "run.py has no function get_config(), which returns"),
    ("get_config = 3", "run.py has no function get_config(), which returns"),
    (
      "def get_config(): return 3",
      "run.py: get_config returned an object of type int, not an "
      "mtp_jax.config.Config",
    ),
    ("def get_config(): pass", "of type NoneType, not an mtp_jax.config.Conf"),
    (
      "def get_config():\n  return {}['no']\n",
      "run.py, line 2: KeyError: 'no'",
    ),
    ("def get_config(name): pass", "needs an argument: --config=run.py:ARGU"),
    (
      f"{IMPORT}def get_config():\n  return config.Model(\n    widht=3)\n",
      "run.py, line 3: config has no field 'model.widht'; did you mean "
      "model.width",
    ),
    (
      f"{IMPORT}c = config.Config().replace(model=dict(widht=3))\n",
      "run.py, line 2: config has no field 'model.widht'; did you mean",
    ),
    (
      f"{IMPORT}c = config.Config()\nc.model.width = 3\n",
      "run.py, line 3: cannot assign to field 'width': a config does not "
      "change; make another from it, such as cfg = cfg.replace(model={",
    ),
    (
      f"{IMPORT}c = config.Config(modle=3)\n",
      "run.py, line 2: config has no field 'modle'; did you mean model",
    ),
    (
      f"{IMPORT}def get_config(): return config.Config(model=dict(width=3))",
      "run.py: config.model is a dict; it takes a config.Model",
    ),
    (
      f"{IMPORT}def get_config(): return config.Config().model.widht",
      "run.py, line 2: config has no field 'model.widht'",
    ),
    (
      f"{IMPORT}x = config.Model(n_future=0).check()",
      "run.py, line 2: model.n_future is 0; it must be positive",
    ),
    ("'x'.widht\n", "run.py, line 1: AttributeError: 'str' object has no"),
  ],
)
def test_a_config_file_is_blamed_by_its_line(text, line, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.py").write_text(text, encoding="latin-1")
  with pytest.raises(ValueError) as error:
    config_file.load("run.py")
  assert line in str(error.value) and "\n" not in str(error.value)


def test_config_files_are_found(tmp_path, monkeypatch):
  """In the current folder first, then in the installation."""
  monkeypatch.chdir(tmp_path)
  assert config_file.load("configs/quickstart.py").model.vocab == 259
  (tmp_path / "configs").mkdir()
  text = "def get_config(n='7'): return config.Config(config.Model(int(n)))"
  (tmp_path / "configs/quickstart.py").write_text(IMPORT + text)
  assert config_file.load("configs/quickstart.py").model.vocab == 7
  assert config_file.load("configs/quickstart.py:8").model.vocab == 8
  monkeypatch.setenv("HOME", str(tmp_path))
  assert config_file.load("~/configs/quickstart.py").model.vocab == 7
  of_a_run = config_file.load("configs/quickstart.py:9").check()
  (tmp_path / "config.json").write_text(config.to_json(of_a_run))
  assert config_file.load("config.json") == of_a_run
  (tmp_path / "plain.py").write_text(IMPORT + RETURN)
  with pytest.raises(ValueError, match="plain.py takes no argument: leave out"):
    config_file.load("plain.py:8")
  with pytest.raises(ValueError, match="no config file plan.py.* plain.py?"):
    config_file.load("plan.py")
  with pytest.raises(ValueError, match="did you mean configs/paper/induction"):
    config_file.load("configs/paper/__init.py")  # its __init__.py is no config


def test_overrides_reach_every_kind_of_field(tmp_path, monkeypatch):
  """absl flags reach nested fields, tuples included, of a config file."""
  file = tmp_path / "run.py"
  file.write_text(
    inspect.cleandoc("""
    from mtp_jax import config


    def get_config():
      return config.Config(model=config.Model(width=96, layers=9))
    """)
  )

  def parse(*overrides):
    monkeypatch.setattr(sys, "argv", ["run", f"--config={file}", *overrides])
    values = flags.FlagValues()
    holder = options.define_config(values)
    values(sys.argv)
    return holder.value

  assert parse() == config.Config(config.Model(width=96, layers=9))
  cfg = parse(
    "--config.model.n_future=2",
    "--config.train.head_weights=(1.0,2.0)",
    "--config.optim.peak=1",
    "--config.model.head=causal",
    "--config.model.mask_documents=false",
    "--config.mesh.model=-1",
    "--config.mesh.data=2",
  ).check()
  assert cfg == config.Config(
    model=config.Model(
      width=96, layers=9, n_future=2, head="causal", mask_documents=False
    ),
    optim=config.Optim(peak=1.0),
    mesh=config.Mesh(model=-1, data=2),
    train=config.Train(head_weights=(1.0, 2.0)),
  )
  cfg = parse("--config.model.n_future=2", "--config.train.head_weights=(3,1)")
  assert cfg.check().train.head_weights == (3.0, 1.0)
  for override in ("model.n_future=1.5", "optim.peak=high", "model=3"):
    with pytest.raises(flags.IllegalFlagValueError, match=override[:5]):
      parse(f"--config.{override}")


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


PROGRAM = r"""
import contextlib, hashlib, signal, sys, time, warnings
import rich.console
from experiments.startup import interrupts, program
from mtp_jax.train import processes

def compile():  # like a compiler: long, not in Python
  print("compiling", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def train():
  with processes.stop_signals() as asked:
    asked.watch()
    compile()

def take_over():
  with processes.stop_signals() as asked:
    try:
      print("compiling", flush=True)
      time.sleep(99)
    except KeyboardInterrupt:
      pass  # Python ignores it in a finalizer
    asked.watch()
    print("stopped" if asked.wait(20) else "lost")

def take_over_first():  # before the thread can look at the handler
  sys.setswitchinterval(9)
  with processes.stop_signals() as asked:
    try:
      signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
      pass
    asked.watch()
    sys.setswitchinterval(0.005)
    print("stopped" if asked.wait(20) else "lost")

def texts():
  interrupts.PATIENCE = 0.5
  signal.signal(signal.SIGINT, interrupts.stop_text)
  for work in (lambda: time.sleep(99), lambda: time.sleep(99), compile):
    try:
      print("text", flush=True)
      work()
    except KeyboardInterrupt:
      pass

def write():
  while True:
    print("text")

def show():
  while True:
    rich.console.Console().print("text")

def say():
  warnings.warn("the first\nof two lines")
  print("na\u00efve \u4e2d \udc80")

main = globals()[sys.argv.pop()]
program.start(lambda _: main())
"""


def started(name, **variables):
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, name],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def test_ctrl_c_ends_a_program_where_python_does_not_run():
  process = started("compile")
  assert process.stdout.readline() == b"compiling\n"
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, b"interrupted\n")


def test_a_training_that_begins_hears_of_a_ctrl_c_that_python_ignored():
  """Its loop takes the signal over while the program is to end."""
  running = [started(name) for name in ("take_over", "take_over_first")]
  assert running[0].stdout.readline() == b"compiling\n"
  running[0].send_signal(signal.SIGINT)
  for process in running:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"stopped\n"), err


def test_ctrl_c_stops_a_text_and_twice_the_program():
  """Also where Python does not run, in the third text."""
  process = started("texts")
  for _ in range(2):
    assert process.stdout.readline() == b"text\n"
    time.sleep(0.6)  # not within the same half second
    process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == b"text\n"
  assert process.stdout.readline() == b"compiling\n"
  time.sleep(0.6)
  process.send_signal(signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(1)
  while process.poll() is None:
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, b"interrupted\n")


@pytest.mark.parametrize("number, code", [(2, 130), (15, 143)])
def test_the_second_signal_to_a_training_ends_it_at_once(number, code):
  process = started("train")
  assert process.stdout.readline() == b"compiling\n"
  process.send_signal(number)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.5)  # it would save after this step
  for _ in range(60):  # two that wait on a busy machine are one to the system
    process.send_signal(number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(1)
      break
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  # The first may have met Python, which says that it is saving.
  assert err.endswith(b"interrupted\n") and err.count(b"\n") < 3


def test_a_closed_pipe_and_a_poor_encoding_are_no_errors():
  """Side by side: most of their time is the imports."""
  processes = {
    name: started(name, PYTHONIOENCODING="latin-1")
    for name in ("write", "show", "say")
  }
  for name in ("write", "show"):
    assert processes[name].stdout.readline() == b"text\n"
    processes[name].stdout.close()
    assert processes[name].wait(60) == 141
    assert processes[name].stderr.read() == b""
  out, err = processes["say"].communicate(timeout=60)
  assert processes["say"].returncode == 0
  assert out == b"na\xefve ? ?\n"
  assert err == b"warning: the first of two lines\n"


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


def test_an_output_that_is_closed_takes_nothing(call, tmp_path):
  (tmp_path / "closed.py").write_text(CLOSED)
  assert call(module=f"{tmp_path}/closed.py") == (3, "", "")


def test_a_console_script_is_its_program(call, monkeypatch):
  with (ROOT / "pyproject.toml").open("rb") as file:
    scripts = tomllib.load(file)["project"]["scripts"]
  names = "train generate tune_tree train_tokenizer plan".split()
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
