"""Flags that several programs have, each declared in one place."""

import dataclasses
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Iterable

from absl import flags
from ml_collections import config_flags

from experiments.startup import config_file
from mtp_jax import config
from mtp_jax.checkpoint import storage
from mtp_jax.train import processes

# A flag belongs to the program that calls `define_...`: --help shows it there.
flags.disclaim_key_flags()

# Tests import several programs into one process: the last one declares what
# they share.
_SHARED = {"allow_override": True}


def define_config(
  flag_values: flags.FlagValues = flags.FLAGS,
) -> flags.FlagHolder:
  """Declares --config; its value is a `config.Config`, not checked yet."""
  try:
    config_flags.DEFINE_config_file(
      "config",
      None,
      "File with get_config(); --config.model.width=64 overrides a field.",
      flag_values=flag_values,
    )
  except flags.Error as error:  # it reads --flagfile at once
    sys.exit(f"error: {error}")
  # Its own parser quotes a traceback, and waits with a missing file.
  flag_values["config"].parser = _ConfigParser()
  flags.mark_flag_as_required("config", flag_values=flag_values)
  return _ConfigHolder(flag_values, flag_values["config"])


class _ConfigParser(flags.ArgumentParser):
  syntactic_help = "a config file"

  def parse(self, argument: str):
    try:
      return _assignable(config_file.load(argument))
    except ValueError as error:  # of absl's own kind it stays as it is
      raise flags.Error(str(error)) from error

  def flag_type(self) -> str:
    return "config"


def _assignable(value: config.Config):
  """A copy that is not frozen: config_flags assigns what the flags say."""

  def thaw(frozen, values, types):
    kind = dataclasses.make_dataclass(type(frozen).__name__, types.items())
    return kind(**values)

  sections = {}
  for name, section in value.sections().items():
    types = {f.name: f.type for f in dataclasses.fields(section)}
    values = {field: getattr(section, field) for field in types}
    sections[name] = thaw(section, values, types)
  return thaw(value, sections, {k: type(v) for k, v in sections.items()})


class _ConfigHolder(flags.FlagHolder):
  """The flag --config, with a Config as its value."""

  @property
  def value(self) -> config.Config:
    sections = vars(super().value)
    return config.Config().replace(
      **{name: vars(section) for name, section in sections.items()}
    )

  @property
  def given(self) -> dict[str, typing.Any]:
    """The fields that flags override, such as {'model.width': 64}."""
    return config_flags.get_override_values(self._flagvalues["config"])


def define_path(
  name: str, default: str | None, text: str, **options
) -> flags.FlagHolder:
  """Declares a flag that names a file or folder; its value is a Path.

  `~` is the home folder, as the shell only has it in front of a word. An empty
  value is refused: it would be the current folder.
  """
  return flags.DEFINE(_PathParser(), name, default, text, **options)


def define_model() -> flags.FlagHolder:
  """Declares --workdir, a folder that holds a model; --model is the same."""
  holder = define_path(
    "workdir", None, "Folder of a training run, or of a model of others."
  )
  flags.DEFINE_alias("model", "workdir")
  flags.mark_flag_as_required("workdir")
  return holder


def define_dtype(otherwise: str = "the model's own") -> flags.FlagHolder:
  """Declares --dtype, of a model that is decoded; None by default.

  Args:
    otherwise: what None stands for, in the help text. The model's own dtype is
      float32 where its folder has float16.
  """
  text = f"Of matrices and activations; default: {otherwise}."
  return flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], text)


def define_output(
  text: str, default: str | None = None, *, required: bool = True
) -> flags.FlagHolder:
  """Declares --output, a file or folder for results; its value is a Path.

  Args:
    text: of --help.
    default: None: the flag has to be given.
    required: False: it need not be given, and its value may be None.
  """
  holder = define_path("output", default, text, **_SHARED)
  if required and default is None:
    flags.mark_flag_as_required("output")
  return holder


def define_scale(
  names: Iterable[str], default: str | None, text: str
) -> flags.FlagHolder:
  """Declares --scale, which chooses the shapes that are measured, by name."""
  return flags.DEFINE_enum("scale", default, list(names), text, **_SHARED)


def define_seed(text: str) -> flags.FlagHolder:
  """Declares --seed, 0 by default."""
  return flags.DEFINE_integer("seed", 0, text, **_SHARED)


def define_runs() -> flags.FlagHolder:
  """Declares --runs, a pattern for `sweep.chosen`."""
  return flags.DEFINE_string(
    "runs",
    "",
    "Regular expression: only the runs in whose names it is found.",
    **_SHARED,
  )


def define_minutes() -> flags.FlagHolder:
  """Declares --minutes, after which a sweep begins no further run."""
  return flags.DEFINE_float(
    "minutes",
    float("inf"),
    "Begin no run after so many minutes; list those that are left.",
    lower_bound=0,
    **_SHARED,
  )


def refuse_idle(names: Iterable[str], why: str) -> None:
  """Refuses flags that are given and do nothing.

  Args:
    names: of the flags, such as ['cache_len'].
    why: the end of '--cache_len does nothing', such as 'without --decode'.

  Raises:
    ValueError: the first of them.
  """
  for name in names:
    if not flags.FLAGS[name].using_default_value:
      raise ValueError(f"--{name} does nothing {why}: leave it out")


def make_room(path: pathlib.Path) -> None:
  """Makes the folder of a file that will be written once the work is done.

  Raises:
    ValueError: the file could not be written there.
  """
  if path.is_dir():
    raise ValueError(f"{path} is a folder; name a file in it")
  if path.parent.is_file():
    raise ValueError(f"{path.parent} is a file; name a folder")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"cannot make {path.parent}: {error.strerror}; name another place"
    ) from error
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise ValueError(f"{path} cannot be written: permission denied")


class _PathParser(flags.ArgumentParser):
  syntactic_help = "a path"

  def parse(self, argument: str) -> pathlib.Path:
    return storage.local(argument)

  def flag_type(self) -> str:
    return "path"


def define_processes() -> Callable[[], None]:
  """Declares the flags of a run in several processes.

  Returns:
    To be called first in main: joins the others, if there are to be any.
  """
  distributed = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of the TPU slice, or of the SLURM, Open MPI or "
    "Kubernetes job.",
  )
  coordinator = flags.DEFINE_string(
    "coordinator",
    os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "Host:port of process 0, to join processes where JAX finds no cluster.",
  )
  number = flags.DEFINE_integer("num_processes", None, "How many they are.")
  process = flags.DEFINE_integer("process_id", None, "Which of them this is.")
  heartbeat = flags.DEFINE_integer(
    "heartbeat_s",
    processes.HEARTBEAT,
    "Seconds of silence after which a process counts as dead and all stop.",
    lower_bound=1,
  )

  def join():
    alone = not (distributed.value or coordinator.value)
    if alone and (number.value, process.value) != (None, None):
      raise ValueError(
        "--num_processes and --process_id need --coordinator, host:port of "
        "process 0, or --distributed; without them this run would be alone"
      )
    if not alone:
      processes.join(
        coordinator.value,
        number.value,
        process.value,
        heartbeat=heartbeat.value,
      )

  return join
