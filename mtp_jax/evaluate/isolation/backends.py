"""The commands that begin a sandbox, one function for each backend."""

import os
import pathlib
import shlex
import sys


def interpreter() -> str:
  """The Python that runs in a sandbox: this one, without its packages."""
  return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _folders() -> list[str]:
  """What a program may read."""
  prefix = os.path.realpath(sys.base_prefix)
  folders = ["/usr"] if prefix.startswith("/usr") else ["/usr", prefix]
  links = [f"/{name}" for name in ("bin", "lib", "lib32", "lib64")]
  return [f for f in (*folders, *links) if os.path.exists(f)]


def _bwrap(folder: pathlib.Path, size: int) -> list[str]:
  """By bubblewrap.

  Args:
    folder: of the host, empty.
    size: bytes of the folder in memory that a program may write into.
  """
  del folder
  command = shlex.split(
    "bwrap --unshare-pid --unshare-net --unshare-ipc --unshare-uts "
    "--unshare-cgroup-try --die-with-parent --new-session --cap-drop ALL "
    "--clearenv --setenv HOME /tmp --setenv LANG C.UTF-8"
  )
  # Process 1 has to end with bwrap, and holds the checker's descriptors. As
  # root it is bwrap's own process, since the checker becomes another user, and
  # Linux then forgets that it should end with its parent. Another user cannot
  # read its descriptors. Without root, process 1 is the checker.
  if os.geteuid() == 0:
    command += shlex.split("--cap-add CAP_SETUID --cap-add CAP_SETGID")
  else:
    command += ["--as-pid-1"]
  for name in _folders():
    if os.path.islink(name):
      command += ["--symlink", os.readlink(name), name]
      continue
    for parent in reversed(pathlib.Path(name).parents[:-1]):
      command += ["--perms", "0755", "--dir", str(parent)]
    command += ["--ro-bind", name, name]
  command += shlex.split(
    f"--proc /proc --dev /dev --perms 1777 --size {size} --tmpfs /tmp "
    "--remount-ro /dev --remount-ro / --chdir /tmp --"
  )
  return command


def _unshare(folder: pathlib.Path, size: int) -> list[str]:
  """The same by mount and pivot_root, which takes longer."""
  root = os.geteuid() == 0
  lines = ["set -e", f"mount -t tmpfs -o mode=755,size=64k tmpfs {folder}"]
  lines += [f"cd {folder}", "mkdir proc dev tmp old"]
  for name in _folders():
    inside = shlex.quote(f".{name}")
    if os.path.islink(name):
      lines.append(f"ln -s {shlex.quote(os.readlink(name))} {inside}")
      continue
    lines.append(f"mkdir -p {inside}")
    lines.append(f"mount --rbind {shlex.quote(name)} {inside}")
    lines.append(f"mount -o remount,bind,ro {inside}")
  for name in ("null", "zero", "urandom", "random"):
    lines.append(f"touch dev/{name}; mount --bind /dev/{name} dev/{name}")
  lines += [
    "mount -t proc proc proc",
    f"mount -t tmpfs -o mode=1777,size={size},nr_inodes=4k tmpfs tmp",
    "pivot_root . old",
    "umount -l /old; rmdir /old",
    "mount -o remount,bind,ro /",
    "cd /tmp",
    "export HOME=/tmp",
  ]
  # As in `_bwrap`: process 1 is this shell, or else the checker.
  keep, run = (",+setuid,+setgid", "") if root else ("", "exec ")
  lines.append(
    f"{run}setpriv --no-new-privs --inh-caps=-all --bounding-set=-all{keep} "
    '"$@"'
  )
  command = "setpriv --pdeathsig KILL unshare --mount --pid --net --ipc --uts "
  command += "--fork --kill-child=KILL"
  if not root:
    command += " --map-root-user"
  return [*shlex.split(command), "sh", "-c", "\n".join(lines), "sh"]


def _none(folder: pathlib.Path, size: int) -> list[str]:
  del folder, size
  return []


COMMANDS = {"bwrap": _bwrap, "unshare": _unshare, "none": _none}
