"""Messages, docstrings and pages name flags that their program takes.

By the programs' source: imported together, their flags would clash.
"""

import ast
import functools
import re

import pytest
from absl import flags
from test_layout import ROOT, modules

from experiments.startup import options, program
from mtp_jax import config
from mtp_jax.evaluate import sandbox

OPTIONS = "experiments.startup.options"
ABSL = {"help", "helpfull", "flagfile", "verbosity"}
FIELDS = {f"config.{path}" for path in config.paths(config.Config())}
# They start programs of others, or of another commit.
STARTERS = (
  *("mtp_jax.evaluate.isolation.backends", "experiments.engineering.soak.job"),
  *("experiments.measure.study", "experiments.measure.wheels"),
)
FLAG = re.compile(r"(?<![\w-])--([a-z]\w*(?:\.[a-z]\w*)*)(?![\w-]|\.\{)")
OTHERS = re.compile(r"pip install|systemd-run|--xla_")
COMMAND = re.compile(
  r"python -m (experiments\.[.a-z_]*[a-z])(?!\w)((?:\\\n|[^\n#`])*)"
)


@functools.cache
def tree(module: str) -> ast.Module:
  path = ROOT / module.replace(".", "/")
  path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
  return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def shared() -> dict[str, set[str]]:
  """The flags that each function of `options` declares."""
  functions = {n.name: n for n in tree(OPTIONS).body if hasattr(n, "name")}
  return {
    name: set(re.findall(r"(?:DEFINE\w*|_path)\('(\w+)'", ast.unparse(node)))
    | ({"config"} & {name.removeprefix("define_")})
    for name, node in functions.items()
    if name.startswith("define_") and name != "define_path"
  }


def defined(module: str) -> set[str]:
  """The flags that a module declares."""
  found = set()
  for call in ast.walk(tree(module)):
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
      how = call.func.attr
      found |= shared().get(how, set())
      if how.startswith("DEFINE") or how == "define_path":
        name = call.args[0]
        if "sandbox.FLAG" in ast.unparse(name):
          found.add(sandbox.FLAG.removeprefix("--"))
        elif isinstance(name, ast.Constant):
          found.add(name.value)
  return found


@functools.cache
def parts(module: str) -> set[str]:
  """A module of the programs, and those that it imports."""
  seen, ahead = set(), [module]
  while ahead:
    one = ahead.pop()
    if one.startswith("experiments.") and one not in seen:
      seen.add(one)
      ahead += modules()[one]
  return seen


@functools.cache
def taken(module: str) -> set[str]:
  """The flags of a program; those of the config's fields as `config.a.b`."""
  names = ABSL.union(*map(defined, parts(module) - {OPTIONS}))
  return names | (FIELDS if "config" in names else set())


def run_by(name: str) -> str:
  """The module that `python -m` runs: some are found in engineering, too."""
  deeper = name.replace("experiments.", "experiments.engineering.")
  names = f"{name}.__main__", f"{deeper}.__main__", deeper, name
  return next(n for n in names if n in modules())


def texts(module: str) -> list[str]:
  """Strings of a module; a value in an f-string is '{}'."""
  strings = [n for n in ast.walk(tree(module)) if isinstance(n, ast.JoinedStr)]
  inside = {id(part) for string in strings for part in string.values}
  found = [
    "".join(
      part.value if isinstance(part, ast.Constant) else "{}"
      for part in string.values
    )
    for string in strings
  ]
  for node in ast.walk(tree(module)):
    if isinstance(node, ast.Constant) and id(node) not in inside:
      found += [node.value] if isinstance(node.value, str) else []
  return found


def test_commands_in_docstrings_messages_and_pages_give_flags_that_exist():
  pages = [path.read_text("utf-8") for path in ROOT.glob("[!.]*/**/*.md")]
  pages += [path.read_text("utf-8") for path in ROOT.glob("*.md")]
  count = 0
  for text in pages + [text for m in modules() for text in texts(m)]:
    for name, rest in COMMAND.findall(text):
      names = set(FLAG.findall(rest))
      count += len(names)
      assert names <= taken(run_by(name)), name + rest
  assert count > 100


@pytest.mark.parametrize("top", ("mtp_jax", "experiments"))
def test_every_flag_that_a_message_names_exists_where_it_is_printed(top):
  programs = [m for m in modules() if m.startswith("experiments.")]
  count = 0
  for module in modules():
    if not module.startswith(top) or module in STARTERS:
      continue
    users = [p for p in programs if module in parts(p)]
    if top == "mtp_jax":  # what a user runs
      users = [p for p in programs if p.count(".") == 1]
    known = set().union(*map(taken, users))
    for text in texts(module):
      names = set(FLAG.findall(COMMAND.sub("", text)))
      if not OTHERS.search(text):
        count += len(names)
        assert names <= known, (module, text)
  assert count > 9


@pytest.fixture
def values(monkeypatch):
  """The flags of a program with --config, parsed."""
  found = flags.FlagValues()
  options.define_config(found)
  found(["train", f"--config={ROOT}/configs/quickstart.py"])
  monkeypatch.setattr(program.flags, "FLAGS", found)
  return found


def message(text: str) -> str:
  def main(_):
    raise ValueError(text)

  with pytest.raises(SystemExit) as error:
    program.mendable(main)([])
  return str(error.value)


def test_the_fields_of_a_message_are_flags_of_a_program_with_a_config(
  values, monkeypatch
):
  text = "a.jsonl:1: bad. Leave it out with data.on_error='skip', mesh.data=2"
  changed = text.replace("data.on_error='skip'", "--config.data.on_error=skip")
  changed = changed.replace("mesh.data=2", "--config.mesh.data=2")
  assert message(text) == f"error: {changed}"
  for same in (
    "set --config.data.seq_len=9",
    "config.model.width: 64 in the first",
    "x/model.width, model.width.x, data.json and train.model",
  ):
    assert message(same) == f"error: {same}"
  monkeypatch.setattr(program.flags, "FLAGS", flags.FlagValues())
  assert message(text) == f"error: {text}"
