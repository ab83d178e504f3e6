"""Reads JSON files of models' folders."""

import json
import pathlib
from typing import Any


def read(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: it cannot be read, or holds something else.
  """
  try:
    tree = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(tree, dict):
    raise ValueError(f"{path} does not hold a JSON object")
  return tree
