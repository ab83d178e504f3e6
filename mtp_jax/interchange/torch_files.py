"""Tensors in files of `torch.save`, read and written without torch.

Such a file is a zip of uncompressed members in one folder: `data.pkl`, a pickle
that says which tensors there are (`pickles`), and the numbers of each storage
as `data/KEY`. Storages are read when they are asked for.
"""

import errno
import math
import os
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from mtp_jax.interchange import pickles, streaming

_MOST = 2**24  # bytes of data.pkl; 291 tensors take about 2**16
_ALIGNMENT = 64  # bytes, as torch has it, for those who map the file


class Tensor(NamedTuple):
  """A tensor in a file."""

  file: pathlib.Path
  begin: int  # bytes before its storage
  place: pickles.Tensor

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    """A part of it; the rest of the file stays on the disk."""
    place = self.place
    if not math.prod(place.shape):
      return np.empty(place.shape, place.dtype)[index]
    # Opened anew for each part: pages that were read would stay in memory.
    storage = np.memmap(self.file, place.dtype, "r", self.begin, (place.size,))
    view = np.lib.stride_tricks.as_strided(
      storage[place.offset :],
      place.shape,
      [stride * place.dtype.itemsize for stride in place.strides],
      writeable=False,
    )
    return np.array(view[index])


def read(file: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a file by name, unread; other values are left out.

  Raises:
    ValueError: the file cannot be read, is cut off or damaged, is of another
      format, or asks for more than tensors.
  """
  try:
    with zipfile.ZipFile(file) as opened:
      folder = _check(opened)
      program = opened.read(f"{folder}/data.pkl")
      places = _places(file, opened.infolist())
  except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
    # A damaged file may name a place before its begin, where no seek can go.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
      raise ValueError(f"cannot read {file}: {error.strerror}") from error
    raise ValueError(
      f"{file} is no whole file of torch.save, a zip ({error}): fetch it again"
    ) from error
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  prefix = f"{folder}/data/"
  places = {
    name.removeprefix(prefix): place
    for name, place in places.items()
    if name.startswith(prefix)
  }
  try:
    found = pickles.load(program, {key: n for key, (_, n) in places.items()})
    if type(found) is not dict:
      raise ValueError("it does not hold tensors by name")
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  return {
    name: Tensor(file, places[value.storage][0], value)
    for name, value in found.items()
    if isinstance(value, pickles.Tensor)
  }


def write(file: pathlib.Path, entries: dict[str, streaming.Entry]) -> None:
  """Writes tensors as `torch.save` does, one at a time; torch.load reads them.

  Args:
    file: the file.
    entries: by the tensor's name.
  """
  folder = file.stem
  program = pickles.dump({k: (e.dtype, e.shape) for k, e in entries.items()})
  with file.open("wb") as target:
    with zipfile.ZipFile(target, "w") as opened:
      _add(opened, f"{folder}/data.pkl", program)
      _add(opened, f"{folder}/byteorder", b"little")
      for i, entry in enumerate(entries.values()):
        _add(opened, f"{folder}/data/{i}", entry)
      _add(opened, f"{folder}/version", b"3\n")
    target.flush()
    os.fsync(target.fileno())


def _check(opened: zipfile.ZipFile) -> str:
  """The folder of data.pkl in a zip, all members of which are in order."""
  members = opened.infolist()
  names = {member.filename for member in members}
  if len(names) < len(members):
    raise ValueError("two members have one name, which torch.save never writes")
  for member in members:
    path = pathlib.PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts:
      raise ValueError(
        f"member {member.filename!r:.60} lies outside: not of torch.save"
      )
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
      raise ValueError(
        f"member {member.filename!r:.60} is compressed or encrypted, which "
        "torch.save never does"
      )
  folders = {name.split("/")[0] for name in names}
  programs = [name for name in names if name.endswith("/data.pkl")]
  if len(folders) != 1 or programs != [f"{min(folders)}/data.pkl"]:
    raise ValueError(
      "a zip that torch.save did not write: that has one data.pkl"
    )
  folder = min(folders)
  if (size := opened.getinfo(f"{folder}/data.pkl").file_size) > _MOST:
    raise ValueError(
      f"data.pkl has {size} bytes, more than the {_MOST} that tensors need"
    )
  if f"{folder}/byteorder" in names:
    if (order := opened.read(f"{folder}/byteorder")) != b"little":
      raise ValueError(f"byte order {order!r:.60} is not supported")
  return folder


def _places(file, members) -> dict[str, tuple[int, int]]:
  """Where the bytes of each member begin, and how many there are."""
  places, whole = {}, file.stat().st_size
  with file.open("rb") as opened:
    for member in members:
      opened.seek(member.header_offset)
      header = opened.read(30)
      if len(header) < 30 or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"{member.filename!r:.60} has no header")
      lengths = header[26:28], header[28:30]  # of the name and what follows it
      begin = member.header_offset + 30
      begin += sum(int.from_bytes(x, "little") for x in lengths)
      if begin + member.file_size > whole:
        raise zipfile.BadZipFile(f"{member.filename!r:.60} is cut off")
      places[member.filename] = begin, member.file_size
  return places


def _add(opened, name, content) -> None:
  """Adds a member whose bytes begin at a multiple of the alignment."""
  member = zipfile.ZipInfo(name)
  member.file_size = len(content)
  large = member.file_size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile has it
  begin = opened.fp.tell() + 30 + len(name) + 4 + 20 * large
  padding = -begin % _ALIGNMENT
  # A field of the header that readers pass over, with torch's mark.
  member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
  with opened.open(member, "w") as target:
    target.write(content if isinstance(content, bytes) else content.bytes())
