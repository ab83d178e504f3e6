"""Writes safetensors files, one tensor at a time.

A file is the length of a header (8 bytes, little-endian), the header (JSON: the
dtype, shape and place of each tensor, and metadata), and the tensors' bytes.
The `safetensors` package, which reads these files here, would write them from
arrays that are all in memory.
"""

import json
import os
import pathlib

from mtp_jax.interchange import streaming

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write(
  path: pathlib.Path,
  entries: dict[str, streaming.Entry],
  metadata: dict[str, str],
) -> None:
  """Writes a file, and has it reach the disk.

  Args:
    path: the file.
    entries: by the tensor's name.
    metadata: kept in the header.
  """
  header, end = {"__metadata__": metadata}, 0
  # Larger numbers first: each tensor begins at a multiple of its number's size.
  order = sorted(entries, key=lambda name: entries[name].dtype != "float32")
  for name in order:
    entry = entries[name]
    begin, end = end, end + len(entry)
    header[name] = {
      "dtype": _NAMES[entry.dtype],
      "shape": entry.shape,
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
      file.write(entries[name].bytes())
    file.flush()
    os.fsync(file.fileno())
