"""--config: files are found, overridden, and blamed by their lines."""

import inspect
import sys

import pytest
from absl import flags

from experiments.startup import config_file, options
from mtp_jax import config

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
