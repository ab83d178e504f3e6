"""Paths, folders, orbax's writer, and what errors of the storage mean.

Nothing here depends on what a checkpoint contains.
"""

import contextlib
import errno
import glob
import json
import logging
import os
import pathlib
import re
import stat
import sys
import traceback
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import multihost

_STEP = re.compile("0|[1-9][0-9]*")
_ASIDE = re.compile("damaged-[0-9]+")  # steps whose damage is proven

# Operating system errors that a damaged file can cause, since a path in it may
# be wrong. The device, the network, permissions or memory cause all others.
_CONTENT = (
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EINVAL,
  errno.ENAMETOOLONG,
)
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in tensorstore's messages
# Status codes of tensorstore, object stores and XLA for temporary failures.
_STATUS = re.compile(
  "\\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|PERMISSION_DENIED|"
  "UNAUTHENTICATED|ABORTED|CANCELLED): "
)
# Status codes of tensorstore for a missing or malformed file.
_MALFORMED = re.compile(
  "\\b(NOT_FOUND|DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION|INVALID_ARGUMENT): "
)


class _Path(type(epath.Path("."))):
  """A path whose `glob` treats the path's own characters literally.

  orbax merges the files of its processes by `folder.glob("ocdbt.process_*")`.
  In etils, "[3]" in the name of the folder would be a pattern. Nothing would
  match, and orbax would leave a checkpoint that cannot be read.
  """

  def glob(self, pattern: str) -> Iterator[epath.Path]:
    if "://" in str(self):
      return super().glob(pattern)
    return (self / name for name in glob.glob(pattern, root_dir=self))


def local(path: str | pathlib.Path) -> pathlib.Path:
  """A path with `~` expanded.

  Raises:
    ValueError: the path is empty, or `~name` is not a user.
  """
  if not str(path).strip():
    raise ValueError("a path is empty; the current folder is .")
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ValueError(
      f"path {str(path)!r}: {error} Write the path without ~"
    ) from error


def folder(path: str | pathlib.Path) -> epath.Path:
  """The absolute path of a folder of checkpoints.

  Raises:
    ValueError: `local` refuses the path, or orbax cannot write below it.
  """
  text = str(path)
  if "://" not in text:
    absolute = local(path).absolute()
    # "link/.." is the parent of the folder that the link leads to.
    text = str(absolute.resolve() if ".." in absolute.parts else absolute)
  check_text(text)
  if "\\" in text:
    raise ValueError(
      f"path {text} has a backslash, which tensorstore reads as a slash; take "
      "another folder"
    )
  if "gs:/" in f"{text.removeprefix('gs://')}/":
    raise ValueError(
      f"path {text} has a folder whose name ends in 'gs:', which orbax reads "
      "as an address (gs://); take another folder"
    )
  return _Path(text)


def check_text(path: str | pathlib.Path) -> None:
  """Raises ValueError for a path that cannot be written to files as text."""
  text = str(path)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"path {text!r} is not valid UTF-8; take another folder"
    ) from error
  if "\0" in text:
    raise ValueError(f"path {text!r} has a null character; remove it")


def not_writable(workdir: pathlib.Path, error: Exception) -> str:
  """The error message for a workdir that cannot be written."""
  remedy = "take another workdir"
  if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
    remedy = f"free space there, or {remedy}"
  return f"cannot write to workdir {workdir}: {error}; {remedy}"


def steps(folder: epath.Path) -> list[int]:
  """The steps that have a folder, oldest first, complete or not.

  Raises:
    OSError: the folder cannot be listed.
  """
  try:
    entries = list(folder.iterdir())
  except FileNotFoundError:
    return []
  # isdigit() accepts "²" and isdecimal() accepts "٣"; orbax writes neither.
  named = [entry for entry in entries if _STEP.fullmatch(entry.name)]
  return sorted(int(entry.name) for entry in named if _is_folder(entry))


def _is_folder(path: epath.Path) -> bool:
  """Like `path.is_dir()`, but raises if permission is missing."""
  if "://" in str(path):
    return path.is_dir()
  try:
    return stat.S_ISDIR(os.stat(path).st_mode)
  except FileNotFoundError:  # removed after it was listed
    return False


def set_aside(folder: epath.Path, steps: dict[int, bool]) -> None:
  """Renames or removes damaged steps, and logs a warning.

  The newest step with proven damage is renamed to damaged-STEP. Older ones are
  removed, and so is an earlier damaged-STEP, because they would fill the disk.
  A step whose damage is not proven is renamed to unreadable-STEP and is never
  removed.

  Args:
    folder: of checkpoints.
    steps: number -> whether the damage is proven (`is_proven`).
  """
  names = [entry.name for entry in folder.iterdir()]
  existing = [step for step in sorted(steps) if str(step) in names]
  proven = [step for step in existing if steps[step]]
  removed = [f"{step}" for step in proven[:-1]]
  renamed = {}
  for step in existing:
    if not steps[step]:
      name = f"unreadable-{step}"
      while name in names:  # from an earlier run
        name += "-"
      renamed[step] = name
  if proven:
    removed += [name for name in names if _ASIDE.fullmatch(name)]
    renamed[proven[-1]] = f"damaged-{proven[-1]}"
  actions = [
    f"damaged checkpoint {step} is set aside as {name}"
    for step, name in renamed.items()
  ]
  if removed:
    actions.append(f"older damaged ones are removed: {', '.join(removed)}")
  if actions:
    absl_logging.warning("%s: %s", folder, "; ".join(actions))
  for name in removed:
    (folder / name).rmtree()
  for step, name in renamed.items():
    (folder / str(step)).rename(folder / name)


def is_damage(error: BaseException) -> bool:
  """Whether the contents of files may have caused the error of a read.

  Otherwise the disk, the network, permissions or memory caused it, and the
  same read may succeed later.
  """
  for link in _chain(error):
    if isinstance(link, MemoryError):
      return False
    codes = [int(code) for code in _OS_ERROR.findall(str(link))]
    if isinstance(link, OSError) and link.errno:
      codes.append(link.errno)
    elif isinstance(link, TimeoutError) or _STATUS.search(str(link)):
      return False
    if not set(codes) <= set(_CONTENT):
      return False
  return True


def is_proven(error: BaseException) -> bool:
  """Whether the error of a read says that a file is missing or malformed."""
  kinds = FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError
  return any(
    isinstance(link, kinds) or _MALFORMED.search(str(link))
    for link in _chain(error)
  )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """The error, then its cause or context, and so on."""
  seen = []
  while error and error not in seen:
    seen.append(error)
    yield error
    error = error.__cause__ or error.__context__


def line(error: BaseException) -> str:
  """The first cause of an error, in one line of at most 600 characters."""
  while error.__cause__:
    error = error.__cause__
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) < 600 else f"{text[:400]} ... {text[-160:]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences the logs of orbax about errors that are raised anyway.

  Without this, a full disk is logged with a traceback by each of orbax's
  threads, by asyncio, and by each of tensorstore's late writes. A damaged file
  is logged by each read that orbax abandons. --verbosity=1 shows these logs.
  """

  def is_wanted(record: logging.LogRecord) -> bool:
    source = f"{record.pathname} {record.getMessage()}"
    return "/orbax/checkpoint/" not in source or absl_logging.vlog_is_on(1)

  def hook(failure):
    frames = traceback.walk_tb(failure.exc_traceback)
    is_orbax = str(failure.exc_value) == "Event loop is closed" or any(
      "/orbax/checkpoint/" in frame.f_code.co_filename for frame, _ in frames
    )
    if not is_orbax or absl_logging.vlog_is_on(1):
      old_hook(failure)

  loggers = absl_logging.get_absl_logger(), logging.getLogger("asyncio")
  old_hook, sys.unraisablehook = sys.unraisablehook, hook
  for logger in loggers:
    logger.addFilter(is_wanted)
  try:
    yield
  finally:
    for logger in loggers:
      logger.removeFilter(is_wanted)
    if sys.unraisablehook is hook:
      sys.unraisablehook = old_hook


def open_writer(folder: epath.Path, keep: int) -> ocp.CheckpointManager:
  """Opens orbax's manager to write.

  It makes the folder, removes what killed saves left, and keeps the newest
  `keep` steps.
  """
  several = jax.process_count() > 1
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(
        barrier_sync_fn=barrier if several else None
      ),
    ),
  )


def barrier(*, key: str, timeout_ms: int) -> None:
  """orbax's barrier for saving threads; a thread whose save failed skips it.

  orbax enters the barrier in a `finally` block, even after an error. The other
  processes never arrive there, so the error would be raised only after a
  timeout of ten minutes.
  """
  if error := sys.exc_info()[1]:
    raise error
  multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
