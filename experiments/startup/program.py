"""How every program starts: flags to a checked config, errors in a line."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import re
import runpy
import select
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments.startup import config_file, interrupts
from mtp_jax import config
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.train import loop, processes

_PIPE = 128 + signal.SIGPIPE  # the exit code of `yes | head` in a shell
_MENDABLE = (  # by the user: told in one line
  ValueError,
  OSError,
  checkpoints.CheckpointError,
  processes.PeerLost,
  loop.Diverged,
)

# A flag belongs to the program that calls `define_...`: --help shows it there.
flags.disclaim_key_flags()


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


def define_path(
  name: str, default: str | None, text: str, **options
) -> flags.FlagHolder:
  """Declares a flag that names a file or folder; its value is a Path.

  `~` is the home folder, as the shell only has it in front of a word. An empty
  value is refused: it would be the current folder.
  """
  return flags.DEFINE(_PathParser(), name, default, text, **options)


def make_room(path: pathlib.Path) -> None:
  """Makes the folder of a file that will be written once the work is done.

  Raises:
    ValueError: the file could not be written there.
  """
  if path.is_dir():
    raise ValueError(f"{path} is a folder; name a file in it")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"cannot make {path.parent}: {error.strerror}") from error
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
    "Host:port of process 0: join processes that no cluster tells of.",
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


def start(main: Callable[[list[str]], None]) -> None:
  """`app.run`, with what the user can mend said in one line, exit code 1.

  Arguments that are not flags are refused. Ctrl-C ends with 130, a closed pipe
  (`| head`) with 141, both without a traceback. An output that is closed from
  the start (`>&-`) takes nothing. What a terminal's encoding lacks is
  replaced, and a warning is a line. A program that fails leaves at
  once: the ordinary way waits for the other processes of a run, which wait for
  it, and crashes where JAX computes.
  """
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # closed (`>&-`): as if to /dev/null
      setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
  sys.stdout.reconfigure(errors="replace")
  warnings.formatwarning = lambda message, *_, **__: (
    f"warning: {' '.join(str(message).split())}\n"
  )
  try:
    interrupts.watch()
    app.run(mendable(main), flags_parser=mendable(_parse))
  except BaseException as error:
    if code := _exit_code(error):
      _leave(code)
    if jax.distributed.is_initialized():
      jax.distributed.shutdown()
    raise


def console() -> None:
  """What `mtp-train` and its like do: `python -m experiments.train`."""
  name = pathlib.Path(sys.argv[0]).stem.removeprefix("mtp-").replace("-", "_")
  runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def _exit_code(error: BaseException) -> int:
  """The program's exit code; says why, where it is not 0."""
  if isinstance(error, KeyboardInterrupt):
    print("interrupted", file=sys.stderr)
    return 128 + signal.SIGINT
  if not isinstance(error, SystemExit):
    traceback.print_exception(error)
    return 1
  if isinstance(error.code, str):
    print(error, file=sys.stderr)
    return 1
  if error.code == 1 and isinstance(error.__context__, BrokenPipeError):
    return _PIPE  # rich's answer to it
  return error.code or 0


def _leave(code: int) -> None:
  for worker in multiprocessing.active_children():  # grain's
    worker.kill()
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def _parse(argv: list[str]) -> list[str]:
  absl_logging.get_absl_handler().addFilter(worth_saying)
  try:
    if "config" in flags.FLAGS:
      config_file.check_overrides(
        flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
      )
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    line = " ".join(str(error).split())
    if missing := re.search(r"Flag --(\S+) must have a value other", line):
      line = f"--{missing[1]} is required: {flags.FLAGS[missing[1]].help}"
    raise ValueError(line) from error
  except SystemExit:  # absl's 1 after --help
    sys.exit(0)
  if rest[1:]:
    raise ValueError(f"unexpected arguments: {rest[1:]}")
  return rest


def worth_saying(line: logging.LogRecord) -> bool:
  """Whether a line of the log is shown.

  Every line of this project is; of a library, warnings and errors; of orbax,
  which logs every file that it touches, errors only.
  """
  if "site-packages" not in line.pathname:
    return True
  least = logging.ERROR if "orbax" in line.pathname else logging.WARNING
  return line.levelno >= least


def mendable(fun: Callable) -> Callable:
  """`fun` that exits with one line where the user can mend what was wrong."""

  def call(argv):
    try:
      result = fun(argv)
      sys.stdout.flush()
      return result
    except _MENDABLE as error:
      if isinstance(error, BrokenPipeError) and _reader_left():
        sys.exit(_PIPE)
      absl_logging.debug("where it happened", exc_info=True)  # --verbosity=1
      sys.exit(f"error: {_output_fault() or error}")

  return call


def _output_fault() -> str:
  """Why standard output still cannot take what was printed; else empty."""
  try:
    sys.stdout.flush()
  except OSError as error:
    return f"standard output cannot be written: {error.strerror}"
  return ""


def next_commands(
  workdir: pathlib.Path, heads: int, python: str = "python"
) -> str:
  """Lines that say what can be done with a trained model.

  Args:
    workdir: of its run.
    heads: that the model has.
    python: the interpreter that the commands name.
  """
  flag = shlex.quote(f"--workdir={workdir}")
  text = ""
  if heads > 1:
    text += "next, the best trees of drafts:\n"
    text += f"  {python} -m experiments.tune_tree {flag}\n"
  text += "next, a text that continues what is typed:\n"
  return text + f"  {python} -m experiments.generate {flag}\n"


def print_if_possible(text: str) -> None:
  """Prints the last words of work that is saved already.

  Where standard output cannot be written, they and what is printed after them
  are lost without an error.
  """
  try:
    print(text, end="", flush=True)
  except OSError:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _reader_left() -> bool:
  """Whether the broken pipe is the program's output, and not a worker's."""
  output = select.poll()
  for number in (1, 2):
    output.register(number, 0)
  return any(event & select.POLLERR for _, event in output.poll(0))
