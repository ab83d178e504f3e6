"""What a run keeps in its folder, and how a trained model is taken out."""

import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from typing import TextIO

import jax
from absl import logging

from mtp_jax import checkpoint, config, processes, sharding, train
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.data import pipeline
from mtp_jax.model import model

# Fields that may change when a run goes on from a checkpoint, although they
# change what is computed: a run that diverged needs other rates, and one that
# has finished more steps. `changes` says what they were.
_RATES = {
  "optim": ("peak", "warmup", "end"),
  "train": ("steps", "max_bad_steps"),
}
# The other fields that may: where files lie, and how often they are written.
_FREE = {
  "data": ("path", "cache", "workers", "tokenizer"),
  "model": ("attention",),
  "optim": _RATES["optim"],
  "train": (
    "log_every eval_every eval_batches sample_tokens save_every keep loss_block"
  ).split()
  + list(_RATES["train"]),
}

_MODEL = "tokenizer.model"  # the copy in the workdir
_RELEASE = 3  # seconds that a killed process may take to release its lock
_VISIBLE = 10  # seconds that a network file system may take to show a file


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Inside, no other run writes to `workdir`; makes it where it is missing.

  Process 0 locks WORKDIR/lock and writes there who it is. The operating system
  releases the lock when the process ends, in whatever way. The other processes
  look for what process 0 wrote: only in a shared folder do they find it.

  Raises:
    checkpoint.CheckpointError: another run holds the lock; the folder cannot
      be written; or the processes do not share it.
  """
  with contextlib.ExitStack() as stack:
    first = {"error": "", "holder": ""}
    if jax.process_index() == 0:
      try:
        if workdir.exists() and not workdir.is_dir():
          raise NotADirectoryError("it is a file, not a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(
          (workdir / "lock").open("a+", encoding="utf-8")
        )
        first["holder"] = _lock(file, workdir)
        stack.callback(file.truncate, 0)
      except checkpoint.CheckpointError as error:
        first["error"] = str(error)
      except (OSError, ValueError) as error:
        first["error"] = f"cannot write to workdir {workdir}: {error}"
    with processes.watched():
      first = json.loads(processes.gather(json.dumps(first))[0])
      if first["error"]:
        raise checkpoint.CheckpointError(first["error"])
      _check_shared(workdir, first["holder"])
    yield


def _lock(file: TextIO, workdir: pathlib.Path) -> str:
  """Locks the file; returns what it now says of the holder."""
  deadline = time.monotonic() + _RELEASE
  locked = False
  while not locked:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = True
    except BlockingIOError as error:
      if time.monotonic() > deadline:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        raise checkpoint.CheckpointError(
          f"workdir {workdir} is in use by another run ({holder}). Stop that "
          "run, or take another workdir"
        ) from error
      time.sleep(0.05)
    except OSError as error:
      logging.warning(
        "%s is on a file system without locks (%s): nothing keeps a second "
        "run from writing there",
        workdir,
        error,
      )
      break
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  holder = (
    f"host {socket.gethostname()}, process id {os.getpid()}, since {now}, "
    f"start {uuid.uuid4().hex}"
  )
  file.truncate(0)
  file.write(holder)
  file.flush()
  os.fsync(file.fileno())  # other hosts see it now
  return holder


def _check_shared(workdir: pathlib.Path, holder: str) -> None:
  """Raises on all processes where one does not see process 0's file."""
  if jax.process_count() == 1:
    return

  def visible():
    try:
      return (workdir / "lock").read_text(encoding="utf-8") == holder
    except OSError:
      return False

  deadline = time.monotonic() + _VISIBLE
  while not visible() and time.monotonic() < deadline:
    time.sleep(0.05)
  answers = processes.gather("yes" if visible() else "no")
  if missing := [i for i, answer in enumerate(answers) if answer == "no"]:
    raise checkpoint.CheckpointError(
      f"the processes do not share workdir {workdir}: what process 0 writes "
      f"there, processes {missing} do not see. Give all of them the same "
      "folder, on a file system that all of their hosts mount"
    )


def settings(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[config.Config, tokenizer_lib.Tokenizer]:
  """What `load` returns beside the model, without reading its arrays."""
  workdir = pathlib.Path(workdir).expanduser()
  if not (workdir / "checkpoints").is_dir():
    raise checkpoint.CheckpointError(_no_run(workdir))
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    return _settings(workdir, saved.metadata(step))


def load(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer]:
  """A trained model with what it takes to use it: `load_step` but its step."""
  return load_step(workdir, step)[:3]


def load_step(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer, int]:
  """A trained model with what it takes to use it.

  Args:
    workdir: of a run of `run.fit`.
    step: of the checkpoint; None takes the newest whole one.

  Returns:
    (model.Model, config.Config, tokenizer, step), the parameters on this
    process's first device, whatever mesh they were trained on. While reading,
    Adam's moments lie there too.

  Raises:
    checkpoint.CheckpointError: there is no such checkpoint, or no such run.
    ValueError: the tokenizer's model file is missing or another one.
  """
  workdir = pathlib.Path(workdir).expanduser()
  if not (workdir / "checkpoints").is_dir():
    raise checkpoint.CheckpointError(_no_run(workdir))
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    cfg, codec = _settings(workdir, saved.metadata(step))
    mesh = sharding.make_mesh(
      config.Mesh(data=1, model=1), jax.local_devices()[:1]
    )
    like = train.abstract_state(cfg, mesh)
    state, _, step = saved.restore(like, step=step)
  return state.model, cfg, codec, step


def _settings(workdir, record):
  """Config and tokenizer of a checkpoint, from its metadata."""
  cfg = config.from_dict(record["config"])
  copy = workdir / _MODEL  # the original may be gone, or another one by now
  name = cfg.data.tokenizer
  if name != "bytes" and copy.exists():
    name = str(copy)
  codec = tokenizer_lib.load(name)
  if codec.fingerprint != record["tokenizer"]:
    raise ValueError(
      f"tokenizer {name} has fingerprint {codec.fingerprint}; the model was "
      f"trained with {record['tokenizer']}"
    )
  return cfg, codec


def _no_run(workdir: pathlib.Path) -> str:
  """Says that no run was here, and names runs that may be meant."""

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
  above = path.parents[:2]  # `checkpoints` or a step of it was given
  nearest = [p for p in above if (p / "checkpoints").is_dir()] or nearest
  line = f"there is no run in {workdir}: it {fault}"
  if nearest:
    line += f". Did you mean {' or '.join(map(str, nearest[:3]))}?"
  return line


def tokenizer(
  cfg: config.Config, workdir: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a run that starts or resumes in `workdir`.

  A workdir keeps a copy of the run's model file. `data.tokenizer` has to name
  the same model; its file may be gone where it is the name that the run has.

  Raises:
    ValueError: no such tokenizer, another one than the run's, or more ids than
      `model.vocab`.
  """
  name, copy = cfg.data.tokenizer, workdir / _MODEL
  if name == "bytes" or not copy.exists():
    codec = tokenizer_lib.load(name)
  else:
    codec = tokenizer_lib.load(str(copy))
    remedy = f"take another workdir, or --config.data.tokenizer={copy}"
    if pathlib.Path(name).expanduser().exists():
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


def _tokenizer_name(workdir: pathlib.Path) -> str | None:
  """`data.tokenizer` of the run in `workdir`, if its config.json is whole."""
  try:
    text = (workdir / "config.json").read_text(encoding="utf-8")
    return json.loads(text)["data"]["tokenizer"]
  except (OSError, ValueError, KeyError, TypeError):
    return None


def write_settings(cfg: config.Config, workdir: pathlib.Path) -> None:
  """Writes config.json and, once, a copy of the tokenizer's model file.

  Process 0 writes, when nothing can refuse the run any more.
  """
  if jax.process_index():
    return
  copy, partial = workdir / _MODEL, workdir / "partial"
  if cfg.data.tokenizer != "bytes" and not copy.exists():
    shutil.copy(pathlib.Path(cfg.data.tokenizer).expanduser(), partial)
    partial.rename(copy)
  partial.write_text(config.to_json(cfg), encoding="utf-8")
  partial.rename(workdir / "config.json")


def metadata(
  cfg: config.Config,
  codec: tokenizer_lib.Tokenizer,
  packed: tuple[pipeline.Packed, pipeline.Packed],
) -> dict:
  """What a checkpoint says of its run: config and fingerprints."""
  return {
    "config": dataclasses.asdict(cfg),
    "tokenizer": codec.fingerprint,
    "data": {
      "train": packed[0].fingerprint,
      "held_out": packed[1].fingerprint,
    },
  }


def fixed(metadata: dict) -> dict:
  """The part of `metadata` that a run may not change when it goes on."""
  sections = {
    section: {
      name: value
      for name, value in fields.items()
      if name not in _FREE.get(section, ())
    }
    for section, fields in metadata["config"].items()
    if section not in ("mesh", "decode")
  }
  return metadata | {"config": sections}


def changes(stored: dict, metadata: dict) -> list[str]:
  """What is computed otherwise than before the checkpoint, a line each."""
  old, new = stored["config"], metadata["config"]
  return [
    f"{section}.{name} was {old[section].get(name)!r} until here, and is "
    f"{new[section][name]!r} from here on"
    for section, names in _RATES.items()
    for name in names
    if old[section].get(name) != new[section][name]
  ]


def shared(metadata: dict) -> dict:
  """The part of `metadata` that all processes of a run have in common."""
  config = metadata["config"]
  own = _FREE["data"]  # places on each host
  data = {k: v for k, v in config["data"].items() if k not in own}
  return metadata | {"config": config | {"data": data}}
