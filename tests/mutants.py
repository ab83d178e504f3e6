"""Plants bugs and shows that the suite kills each: `make mutants`.

Every mutant is one wrong line in a copy of the tree. The tests named beside
it must pass without the bug and fail with it. Prints a line per mutant; exit
code 1 if one lives or no longer applies.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.planted import Mutant, decoding, evaluation, models, training

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("mtp_jax", "configs", "experiments", "tests", "pyproject.toml")
MUTANTS = (
  training.MUTANTS + decoding.MUTANTS + models.MUTANTS + evaluation.MUTANTS
)


def run_tests(tree: pathlib.Path, tests: set[str]) -> bool:
  """Whether the tests pass in a tree; a loop without end is a failure.

  Raises:
    RuntimeError: pytest itself did not come so far.
  """
  names = [f"tests/{name}" for name in sorted(tests)]
  try:
    done = subprocess.run(
      [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *names,
      ],
      cwd=tree,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      timeout=900,
    )
  except subprocess.TimeoutExpired:
    return False
  if done.returncode not in (0, 1):
    raise RuntimeError(f"pytest {names}: {done.stdout[-2000:]}{done.stderr}")
  return done.returncode == 0


def kill(mutant: Mutant) -> str:
  """'killed', 'LIVES' or 'GONE' (the line to change is not there once)."""
  source = (ROOT / mutant.file).read_text()
  if source.count(mutant.old) != 1:
    return "GONE"
  with tempfile.TemporaryDirectory() as folder:
    tree = copy(pathlib.Path(folder))
    (tree / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    return "LIVES" if run_tests(tree, set(mutant.tests.split())) else "killed"


def copy(folder: pathlib.Path) -> pathlib.Path:
  for part in PARTS:
    if (ROOT / part).is_dir():
      shutil.copytree(ROOT / part, folder / part)
    else:
      shutil.copy(ROOT / part, folder / part)
  return folder


def main() -> None:
  begin = time.time()
  tests = {name for mutant in MUTANTS for name in mutant.tests.split()}
  if not run_tests(ROOT, tests):
    sys.exit("the tests fail without any mutant")
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    fates = []
    for mutant, fate in zip(MUTANTS, pool.map(kill, MUTANTS), strict=True):
      fates.append(fate)
      print(f"{fate:7} {mutant.bug} ({mutant.file})", flush=True)
  minutes = (time.time() - begin) / 60
  print(f"{fates.count('killed')} of {len(fates)} killed, {minutes:.1f} min")
  sys.exit(fates.count("killed") != len(fates))


if __name__ == "__main__":
  main()
