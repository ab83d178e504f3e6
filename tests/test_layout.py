"""The layout: imports go one way, without a circle."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import mtp_jax

ROOT = pathlib.Path(__file__).parents[1]
# Each package imports itself and packages of earlier lines only.
ORDER = [
  {"mtp_jax.fields"},
  {"mtp_jax.section_checks"},
  {"mtp_jax.sections"},
  {"mtp_jax.config"},
  {"mtp_jax.tokenizer", "mtp_jax.sharding"},
  {
    "mtp_jax.tokenizer_training",
    "mtp_jax.data",
    "mtp_jax.model",
    "mtp_jax.checkpoint",
  },
  {"mtp_jax.loss"},
  {"mtp_jax.decode"},
  {"mtp_jax.evaluate"},
  {"mtp_jax.tasks"},
  {"mtp_jax.train"},
  {"mtp_jax.interchange"},
  {"configs"},
  {"experiments.measure"},
  {"experiments.startup"},
  {"experiments.engineering", "experiments.demo"},
  {"experiments.claims"},
  {"experiments"},
]
# Beyond the order: what a package does without although it could import it.
WITHOUT = {
  "mtp_jax.model": {"mtp_jax.sharding", "mtp_jax.tokenizer"},
  "mtp_jax.checkpoint": {"mtp_jax.sharding", "mtp_jax.tokenizer"},
  "mtp_jax.decode": {"mtp_jax.loss", "mtp_jax.data", "mtp_jax.checkpoint"},
}


@functools.cache
def modules() -> dict[str, frozenset[str]]:
  """What each module of the repository imports from it, also in functions."""
  found = {}
  for top in ("mtp_jax", "configs", "experiments"):
    for path in (ROOT / top).rglob("*.py"):
      parts = path.relative_to(ROOT).with_suffix("").parts
      found[".".join(p for p in parts if p != "__init__")] = path
  return {name: imports(path, found) for name, path in found.items()}


def imports(path, known) -> frozenset[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: a relative import"
      names |= {f"{node.module}.{a.name}" for a in node.names}
      names |= {node.module} if node.module in known else set()
  return frozenset(names & known.keys())


def package(module: str) -> str:
  """The longest name of ORDER that the module lies in."""
  every = [p for group in ORDER for p in group]
  inside = [p for p in every if f"{module}.".startswith(f"{p}.")]
  return max(inside, key=len)


def test_imports_go_one_way():
  place = {p: i for i, group in enumerate(ORDER) for p in group}
  for name, imported in modules().items():
    if name == "mtp_jax":
      assert not imported  # only when asked for
      continue
    here = package(name)
    for other in imported - {"mtp_jax"}:
      there = package(other)
      allowed = here == there or place[there] < place[here]
      assert allowed and there not in WITHOUT.get(here, ()), (name, other)


def test_engineering_shares_instruments_only():
  """A folder there imports `measure`, not what another folder is made of."""
  top = "experiments.engineering."
  found = {
    (name, other)
    for name, imported in modules().items()
    for other in imported
    if name.startswith(top) and other.startswith(top) and other.count(".") > 2
    if name.split(".")[2] != other.split(".")[2]
  }
  # The bounds of `train_speed` are judged on an accelerator.
  assert found == {(f"{top}accelerator.training", f"{top}train_speed.bounds")}


def test_what_a_user_runs_is_flags():
  for path in (ROOT / "experiments").glob("*.py"):
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count < 100, f"{path.name} has {count} lines"


def test_no_circle():
  graph = {
    # `from package import module` names the package, which is no import of it.
    name: {m for m in imported if not name.startswith(f"{m}.")}
    for name, imported in modules().items()
  }
  list(graphlib.TopologicalSorter(graph).static_order())


def test_the_face_of_the_library():
  assert set(mtp_jax.__all__) == {
    *("Config", "fit", "generate", "lay_out", "load", "save")
  }
  for name in mtp_jax.__all__:
    assert callable(getattr(mtp_jax, name))
    assert f"mtp_jax.{name} " in mtp_jax.__doc__
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    _ = mtp_jax.lode
  folders = {p.parent.name for p in (ROOT / "mtp_jax").glob("*/__init__.py")}
  files = {p.stem for p in (ROOT / "mtp_jax").glob("*.py")} - {"__init__"}
  for name in folders | files:
    assert name in mtp_jax.__doc__, f"the map lacks {name}"


def test_every_package_has_a_map():
  """Its docstring names its modules, so that a reader need not open them."""
  for path in (ROOT / "mtp_jax").rglob("__init__.py"):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    modules = {p.stem for p in path.parent.glob("*.py")} - {"__init__"}
    modules |= {p.parent.name for p in path.parent.glob("*/__init__.py")}
    lacking = modules - set(re.findall(r"\w+", doc))
    assert not lacking, f"the map of {path.parent.name} lacks {lacking}"


def test_a_config_is_read_without_jax():
  code = "import mtp_jax, sys; mtp_jax.Config; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_commands_from_before_a_move_are_valid():
  import experiments

  assert str(ROOT / "experiments" / "engineering") in experiments.__path__
