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
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("mtp_jax", "configs", "experiments", "tests", "pyproject.toml")


class Mutant(NamedTuple):
  """`old` becomes `new` in `file`; `tests` must see it."""

  bug: str
  file: str
  old: str
  new: str
  tests: str


MUTANTS = [
  Mutant(
    "targets off by one",
    "mtp_jax/loss.py",
    "there = slice(1 + i, 1 + i + T)",
    "there = slice(i, i + T)",
    "test_loss.py",
  ),
  Mutant(
    "targets cross a document's end",
    "mtp_jax/loss.py",
    "inside = (segments[:, there] == here) & (here > 0)",
    "inside = (segments[:, there] > 0) & (here > 0)",
    "test_loss.py",
  ),
  Mutant(
    "causal mask missing",
    "mtp_jax/model/layers.py",
    "mask = (positions[:, None] >= positions)[None, None]",
    "mask = (positions[:, None] >= -1 + 0 * positions)[None, None]",
    "test_layers.py",
  ),
  Mutant(
    "document mask missing",
    "mtp_jax/model/layers.py",
    "  if cfg.mask_documents:",
    "  if not cfg.mask_documents:",
    "test_layers.py",
  ),
  Mutant(
    "rotary angle of the wrong sign on one half",
    "mtp_jax/model/layers.py",
    "a * ctx.cos - b * ctx.sin",
    "a * ctx.cos + b * ctx.sin",
    "test_layers.py",
  ),
  Mutant(
    "rotary position off by one while decoding",
    "mtp_jax/decode/network.py",
    "return layers.context(positions, mask, self.cfg)",
    "return layers.context(positions + (offsets.ndim > 1), mask, self.cfg)",
    "test_network.py",
  ),
]
