"""Every example in a docstring of the library runs and is right."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import mtp_jax

ROOT = pathlib.Path(__file__).parents[1]

# What a notebook user calls; each has an example in its docstring.
NAMES = [
  "mtp_jax.fit",
  "mtp_jax.load",
  "mtp_jax.save",
  "mtp_jax.Config",
  "mtp_jax.tokenizer.Bytes",
  "mtp_jax.data.pipeline.batches",
  "mtp_jax.checkpoint.checkpoints.Checkpoints",
  "mtp_jax.loss.implementations.serial",
  "mtp_jax.decode.layout.lay_out",
  "mtp_jax.decode.layout.limit_drafts",
  "mtp_jax.decode.generate.generate",
  "mtp_jax.decode.serve.generate_all",
  "mtp_jax.decode.stream.stream",
  "mtp_jax.decode.tree.chain",
  "mtp_jax.decode.tree.build",
  "mtp_jax.decode.sampling.Sampler",
  "mtp_jax.train.optim.schedule",
  "mtp_jax.train.step.compile_step",
]
FIRST = "mtp_jax.train.loop.fit"  # it trains the run that others load


def examples() -> list[doctest.DocTest]:
  """One DocTest per docstring that has an example, `fit`'s first."""
  found = []
  for module in pkgutil.walk_packages(mtp_jax.__path__, "mtp_jax."):
    found += doctest.DocTestFinder(exclude_empty=True).find(
      importlib.import_module(module.name), module.name
    )
  found += doctest.DocTestFinder().find(mtp_jax, "mtp_jax")
  return sorted(
    (test for test in found if test.examples), key=lambda t: t.name != FIRST
  )


def failures(tests: list[doctest.DocTest]) -> str:
  """What is wrong with the examples; empty where nothing is."""
  report = []
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  for test in tests:
    runner.run(test, out=report.append)
  return "".join(report)


@pytest.mark.slow
def test_examples_are_right(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  report = failures(examples())
  assert not report, report


def test_a_wrong_example_is_reported():
  wrong = doctest.DocTestParser().get_doctest(
    ">>> 1 + 1\n3\n", {}, "wrong", None, 0
  )
  assert "Expected:\n    3\nGot:\n    2\n" in failures([wrong])


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_that_is_run(name):
  doc = inspect.getdoc(pkgutil.resolve_name(name))
  sources = [[e.source for e in test.examples] for test in examples()]
  own = [e.source for e in doctest.DocTestParser().get_examples(doc)]
  assert own in sources, f"{name} has no example, or none that runs"
  assert "+SKIP" not in doc


@pytest.mark.slow
def test_the_page_of_names_is_right(tmp_path, monkeypatch):
  """API.md: its session runs, and its table names what exists."""
  monkeypatch.chdir(tmp_path)
  text = (ROOT / "API.md").read_text(encoding="utf-8")
  page = doctest.DocTestParser().get_doctest(text, {}, "API.md", None, 0)
  assert len(page.examples) > 30
  assert not failures([page])


def test_the_table_of_names_has_what_exists():
  """Its first column: paths below mtp_jax; a second one may leave some out."""
  text = (ROOT / "API.md").read_text(encoding="utf-8")
  cells = re.findall(r"^\| (`.*?) \|", text, re.M)
  assert len(cells) > 20
  for cell in cells:
    where = ""
    for name in re.findall(r"`([\w.]+)", cell):
      if name.split(".")[0] in ("net", "codec"):  # instances
        continue
      name = name.removeprefix("mtp_jax.")
      assert pkgutil.resolve_name(f"mtp_jax.{where}{name}"), name
      where = "".join(f"{part}." for part in name.split(".")[:-2])
