"""How every program starts and ends: signals, errors in one line."""

import contextlib
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

from experiments.startup import config_file, interrupts
from mtp_jax import config
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import loop, processes

_PIPE = 128 + signal.SIGPIPE  # the exit code of `yes | head` in a shell
_EXHAUSTED = "RESOURCE_EXHAUSTED"  # in JAX's message about too little memory
_MENDABLE = (  # by the user: told in one line
  ValueError,
  OSError,
  checkpoints.CheckpointError,
  processes.PeerLost,
  loop.Diverged,
)


def start(main: Callable[[list[str]], None]) -> None:
  """`app.run`; an error that the user can mend is one line, exit code 1.

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
      sys.exit(f"error: {_output_fault() or _with_flags(str(error))}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      text = f"{type(error).__name__}: {' '.join(str(error).split())}"
      if not isinstance(error, MemoryError) and _EXHAUSTED not in text:
        raise
      absl_logging.debug("where it happened", exc_info=True)
      sys.exit(
        f"error: not enough memory ({text[:200]}): ask for less at once, such "
        "as fewer rows, samples or tokens; in training, for a smaller "
        "--config.data.batch or a higher --config.train.accumulate"
      )

  return call


def _with_flags(text: str) -> str:
  """A message of the library with flags for what it names.

  It begins with an argument, such as 'heads=9', or names fields of the config.
  Both stay where the program has no such flag, and so do the fields in messages
  on the config file, raised while flags are parsed.
  """
  argument = re.match(r"(\w+)=", text)
  if argument and argument[1] in flags.FLAGS:
    text = f"--{text}"
  if not flags.FLAGS.is_parsed() or "config" not in flags.FLAGS:
    return text
  known = set(config.paths(config.Config()))

  def flag(match):
    field, value = match[1], match[2]
    if field not in known:
      return match[0]
    return f"--config.{field}" + (f"={value}" if value else "")

  return re.sub(r"(?<![\w./-])(\w+\.\w+)(?!\.?\w)(?:='(\w+)')?", flag, text)


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


def _reader_left() -> bool:
  """Whether the broken pipe is the program's output, and not a worker's."""
  output = select.poll()
  for number in (1, 2):
    output.register(number, 0)
  return any(event & select.POLLERR for _, event in output.poll(0))
