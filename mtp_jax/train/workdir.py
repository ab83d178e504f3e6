"""The files of a run in its workdir, and loading a trained model from it."""

import dataclasses
import difflib
import json
import os
import pathlib

import jax
from absl import logging

from mtp_jax import config, sharding
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.data import pipeline
from mtp_jax.model import model
from mtp_jax.train import logs
from mtp_jax.train import step as step_lib


def settings(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[config.Config, tokenizer_lib.Tokenizer]:
  """The config and the tokenizer of a run, without reading its arrays.

  Arguments and errors are those of `load_step`.
  """
  workdir = storage.local(workdir)
  if not (workdir / "checkpoints").is_dir():
    raise checkpoints.CheckpointError(no_run(workdir))
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    return _settings(workdir, saved.metadata(step))


def load(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer]:
  """A trained model, its config and its tokenizer; see `load_step`."""
  return load_step(workdir, step)[:3]


def load_step(
  workdir: str | pathlib.Path,
  step: int | None = None,
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer, int]:
  """A trained model, its config, its tokenizer and its step.

  Args:
    workdir: folder of a run of `loop.fit`.
    step: step of the checkpoint; None means the newest whole one.
    mesh: devices of the parameters, whatever mesh they were trained on; None:
      this process's first device.

  Returns:
    (model, config, tokenizer, step). The optimiser's moments are not read.

  Raises:
    checkpoints.CheckpointError: there is no such run or no such checkpoint.
    ValueError: the model file of the tokenizer is missing or is another one,
      or the path is empty or begins with an unknown user.
  """
  workdir = storage.local(workdir)
  if not (workdir / "checkpoints").is_dir():
    raise checkpoints.CheckpointError(no_run(workdir))
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    cfg, codec = _settings(workdir, saved.metadata(step))
    mesh = sharding.first_device() if mesh is None else mesh
    like = {"model": step_lib.abstract_state(cfg, mesh).model}
    state, _, step = saved.restore(like, step=step, partial=True)
  return state["model"], cfg, codec, step


def has_checkpoints(workdir: pathlib.Path) -> bool:
  """Whether a run in this workdir would resume."""
  if not (workdir / "checkpoints").is_dir():
    return False
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    return bool(saved.steps())


def _settings(workdir, record):
  """The config and the tokenizer that a checkpoint's metadata names.

  `data.tokenizer` is the path that the tokenizer was read from.
  """
  cfg = config.from_dict(record["config"])
  name = cfg.data.tokenizer
  copy = _copy(name, workdir)  # the original may have been moved or replaced
  if name != "bytes" and copy.exists():
    name = str(copy)
  remedy = f"put the tokenizer of fingerprint {record['tokenizer']} at {copy}"
  try:
    codec = tokenizer_lib.load(name)
  except ValueError as error:
    raise ValueError(f"{error}; {remedy}") from error
  if codec.fingerprint != record["tokenizer"]:
    raise ValueError(
      f"tokenizer {name} has fingerprint {codec.fingerprint}; the model was "
      f"trained with {record['tokenizer']}: {remedy}"
    )
  return cfg.replace(data={"tokenizer": name}), codec


def no_run(workdir: pathlib.Path) -> str:
  """The error message for a workdir without a run; names similar folders."""

  def runs(folder):
    return sorted(p.parent for p in folder.glob("*/checkpoints") if p.is_dir())

  path = workdir.absolute()
  if workdir.is_dir():
    fault = "has no folder `checkpoints`"
    nearest = runs(path)
  else:
    fault = "is a file" if workdir.exists() else "does not exist"
    names = {str(p): p for p in runs(path.parent)}
    nearest = [names[n] for n in difflib.get_close_matches(str(path), names)]
  above = path.parents[:2]  # in case `checkpoints` or a step was given
  nearest = [p for p in above if (p / "checkpoints").is_dir()] or nearest
  line = f"there is no run in {workdir}: it {fault}"
  if nearest:
    line += f". Did you mean {' or '.join(map(str, nearest[:3]))}?"
  return line


def tokenizer(
  cfg: config.Config, workdir: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a run that starts or resumes in `workdir`.

  The workdir holds a copy of the run's tokenizer. `data.tokenizer` must name
  the same. Its file may be missing if the name is that of the run. If the copy
  is damaged, the file that `data.tokenizer` names is used, and `write_settings`
  repairs the copy.

  Raises:
    ValueError: there is no such tokenizer, it is not the run's, the copy is
      damaged and the file missing, or it has more ids than `model.vocab`.
  """
  name, copy = cfg.data.tokenizer, _copy(cfg.data.tokenizer, workdir)
  if name == "bytes" or not copy.exists():
    codec = tokenizer_lib.load(name)
  elif fault := _fault(copy):
    codec = _original(name, workdir, fault)
  else:
    codec = tokenizer_lib.load(str(copy))
    remedy = f"take another workdir, or --config.data.tokenizer={copy}"
    if storage.local(name).exists():
      fingerprint = tokenizer_lib.load(name).fingerprint
      if fingerprint != codec.fingerprint:
        raise ValueError(
          f"tokenizer {name!r} has fingerprint {fingerprint}, the run in "
          f"{workdir} has {codec.fingerprint}: {remedy}"
        )
    elif name != (known := _tokenizer_name(workdir)):
      raise ValueError(
        f"there is no tokenizer {name!r}, and the run in {workdir} began with "
        f"{known!r}: {remedy}"
      )
  if cfg.model.vocab < codec.vocab:
    raise ValueError(
      f"model.vocab {cfg.model.vocab} is smaller than the {codec.vocab} ids of "
      f"tokenizer {name!r}: set --config.model.vocab={codec.vocab} or more"
    )
  return codec


def _copy(name: str, workdir: pathlib.Path) -> pathlib.Path:
  """The file of the workdir's copy of tokenizer `name`; it may be missing."""
  named = storage.local(name)
  named = tokenizer_lib.find(named) or named  # it may be a folder
  kind = "tokenizer.json" if named.suffix == ".json" else "tokenizer.model"
  copy = workdir / kind
  return copy if copy.exists() else tokenizer_lib.find(workdir) or copy


def _fault(name: str | pathlib.Path) -> str:
  """Why the file is not a tokenizer; empty if it is one."""
  try:
    tokenizer_lib.load(str(name))
  except ValueError as error:
    return str(error)
  return ""


def _original(
  name: str, workdir: pathlib.Path, fault: str
) -> tokenizer_lib.Tokenizer:
  """The tokenizer `name`, for a run whose own copy is damaged.

  Args:
    name: see `config.Data.tokenizer`.
    workdir: of the run.
    fault: what is wrong with the copy.

  Raises:
    ValueError: `name` cannot be read, or is not the tokenizer of the newest
      checkpoint.
  """
  saved = _saved_fingerprint(workdir)
  which = f"of fingerprint {saved}" if saved else "that the run began with"
  remedy = f"put the tokenizer {which} at {_copy(name, workdir)}"
  if _fault(name):
    raise ValueError(f"{fault}; {remedy}")
  codec = tokenizer_lib.load(name)
  if saved not in (None, codec.fingerprint):
    raise ValueError(
      f"{fault}; tokenizer {name!r} has another fingerprint, "
      f"{codec.fingerprint}: {remedy}"
    )
  logging.warning("%s; a copy of %s replaces it", fault, name)
  return codec


def _saved_fingerprint(workdir: pathlib.Path) -> str | None:
  """The fingerprint of the newest checkpoint's tokenizer, if there is one.

  With several processes it is None, because they can read checkpoints only
  together. They compare fingerprints when they restore.
  """
  folder = workdir / "checkpoints"
  if jax.process_count() > 1 or not folder.is_dir():
    return None
  try:
    with checkpoints.Checkpoints(folder) as saved:
      return saved.metadata()["tokenizer"]
  except checkpoints.CheckpointError:  # `restore` will raise it again
    return None


def _tokenizer_name(workdir: pathlib.Path) -> str | None:
  """`data.tokenizer` in config.json, or None if that cannot be read."""
  try:
    text = (workdir / "config.json").read_text(encoding="utf-8")
    return json.loads(text)["data"]["tokenizer"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None


def check_format(workdir: pathlib.Path) -> None:
  """Checks that a run may replace config.json in a workdir.

  Raises:
    ValueError: this version of the library cannot read its format, or it is
      that of a model of Hugging Face.
  """
  path = workdir / "config.json"
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    number, is_other = found.get("format", 1), "model_type" in found
  except (OSError, ValueError, AttributeError, RecursionError):
    return  # no run yet, or a damaged file, which `write_settings` replaces
  if is_other:
    raise ValueError(
      f"{workdir} holds a model of Hugging Face, whose config.json a run would "
      "replace: take another workdir"
    )
  config.check_format(str(path), number)


def write_settings(cfg: config.Config, workdir: pathlib.Path) -> None:
  """Writes config.json and, if missing, a copy of the tokenizer.

  Only process 0 writes. `fit` calls this after its last check of the settings.

  Raises:
    checkpoints.CheckpointError: `workdir` cannot be written.
  """
  if jax.process_index():
    return
  name = cfg.data.tokenizer
  try:
    if name != "bytes" and _fault(_copy(name, workdir)):
      for file, content in tokenizer_lib.load(name).files().items():
        partial = workdir / f"{file}.partial"
        partial.write_bytes(content)
        os.replace(partial, workdir / file)
    logs.write_whole(workdir / "config.json", config.to_json(cfg))
  except OSError as error:
    raise checkpoints.CheckpointError(
      storage.not_writable(workdir, error)
    ) from error


def metadata(
  cfg: config.Config,
  codec: tokenizer_lib.Tokenizer,
  splits: tuple[pipeline.Packed, ...],
) -> dict:
  """The metadata of a checkpoint: config, and fingerprints of its inputs.

  `splits` are empty where the corpus is not packed yet.
  """
  names = ("train", "held_out") if splits else ()
  return {
    "config": dataclasses.asdict(cfg),
    "tokenizer": codec.fingerprint,
    "data": {n: s.fingerprint for n, s in zip(names, splits, strict=True)},
  }
