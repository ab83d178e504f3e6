"""Logs: what a cut-off run left behind goes, and no log ends a run."""

import csv
import os
import pathlib
import resource
import shutil
import struct

import pytest
from tensorboardX.proto import event_pb2

from mtp_jax.train import logs


def rows(path):
  with path.open(encoding="utf-8") as file:
    return list(csv.DictReader(file))


def events(folder):
  """(step, tag, value) of the event files in the order of their making."""
  found = []
  for path in sorted(folder.iterdir()):
    raw = path.read_bytes()
    while raw:
      (size,) = struct.unpack("<Q", raw[:8])
      if len(raw) < 16 + size:  # cut off; TensorBoard reads on in the next
        break
      event = event_pb2.Event.FromString(raw[12 : 12 + size])
      found += [(event.step, v.tag, v) for v in event.summary.value]
      raw = raw[16 + size :]
  return found


def test_csv_and_events_hold_the_numbers(tmp_path):
  writer = logs.Writer(tmp_path / "w", 0)
  writer.write("train", 10, {"loss": 1.5, "nats_1": 0.25})
  writer.write("train", 20, {"loss": 1.25, "nats_1": 1 / 3})
  writer.write("held_out", 20, {"loss": 7})
  writer.write_sample(20, "a text")
  assert rows(tmp_path / "w/train.csv") == [
    {"step": "10", "loss": "1.5", "nats_1": "0.25"},
    {"step": "20", "loss": "1.25", "nats_1": "0.333333333"},
  ]
  assert rows(tmp_path / "w/held_out.csv") == [{"step": "20", "loss": "7"}]
  assert (tmp_path / "w/samples/000020.txt").read_text() == "a text\n"
  found = events(tmp_path / "w/tensorboard")
  scalars = {(s, t): v.simple_value for s, t, v in found}
  assert scalars[10, "train/loss"] == 1.5
  assert scalars[20, "held_out/loss"] == 7
  assert (20, "sample/text_summary") in scalars


def test_a_resumed_run_goes_on_where_the_checkpoint_is(tmp_path):
  writer = logs.Writer(tmp_path, 0)
  for step in (10, 20, 30):
    writer.write("train", step, {"loss": step})
  with (tmp_path / "train.csv").open("a") as file:
    file.write("40,")  # killed while it wrote
  writer = logs.Writer(tmp_path, 20)
  writer.write("train", 30, {"loss": 31})
  assert [(r["step"], r["loss"]) for r in rows(tmp_path / "train.csv")] == [
    ("10", "10"),
    ("20", "20"),
    ("30", "31"),
  ]


def test_other_processes_write_nothing(tmp_path):
  writer = logs.Writer(tmp_path / "w", 0, active=False)
  writer.write("train", 1, {"loss": 1})
  writer.write_sample(1, "text")
  assert not (tmp_path / "w").exists()


LOG = "--- step a0: loss 3.0\\n--- step \ufffd\\udcff \r\n"


def test_a_sample_may_hold_any_text(tmp_path):
  for start, step in ((0, 5), (5, 10), (10, 15), (5, 10)):
    logs.Writer(tmp_path, start).write_sample(step, f"{LOG}{start}")
  found = {p.name: p.read_bytes() for p in (tmp_path / "samples").iterdir()}
  assert found == {  # a run that goes on from 5 has not come to 15
    "000005.txt": f"{LOG}0\n".encode(),
    "000010.txt": f"{LOG}5\n".encode(),
  }


@pytest.mark.parametrize(
  "damage",
  [
    b"20,2,3\r\n",
    b"20,\xff\r\n",
    b"2\xb2,1\r\n",
    b"\r\n",
    b'"20,1\r\n',
    b"20\r\n",
  ],
)
def test_what_cannot_be_read_is_set_aside(tmp_path, caplog, damage):
  file = tmp_path / "train.csv"
  whole = b"step,loss\r\n10,1\r\n" + damage + b"30,3\r\n40,4\r\n"
  file.write_bytes(whole)
  writer = logs.Writer(tmp_path, 30)
  assert writer.has("train", 30) and not writer.has("train", 20)
  writer.write("train", 40, {"loss": 5})
  writer.write("train", 50, {"loss": 6})
  assert file.read_bytes() == b"step,loss\r\n10,1\r\n30,3\r\n40,5\r\n50,6\r\n"
  assert (tmp_path / "train.csv.damaged0").read_bytes() == whole
  (said,) = caplog.messages
  assert f"1 lines of {file} cannot be read" in said
  file.write_bytes(damage + whole)  # no header: nothing can be read
  logs.Writer(tmp_path, 50).write("train", 60, {"loss": 7})
  assert file.read_bytes() == b"step,loss\r\n60,7\r\n"
  assert (tmp_path / "train.csv.damaged1").read_bytes() == damage + whole


def test_a_log_that_is_no_regular_file_is_set_aside(
  tmp_path, caplog, monkeypatch
):
  """Reading /dev/zero has no end, and a FIFO waits for one who writes."""

  def read_bytes(path):
    assert path.is_file()
    with path.open("rb") as file:
      return file.read()

  monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
  (tmp_path / "train.csv").symlink_to("/dev/zero")
  os.mkfifo(tmp_path / "held_out.csv")
  writer = logs.Writer(tmp_path, 0)
  for group in ("train", "held_out"):
    assert not writer.has(group, 1)
    writer.write(group, 1, {"loss": 2})
    assert rows(tmp_path / f"{group}.csv") == [{"step": "1", "loss": "2"}]
    aside = tmp_path / f"{group}.csv.damaged0"
    assert aside.exists() and not aside.is_file()
    said = caplog.messages.pop()
    assert (
      f"{group}.csv is not a regular file: it is renamed to {aside.name}"
      in said
    )


def test_a_full_disk_ends_no_run_and_loses_no_row(tmp_path, caplog):
  writer = logs.Writer(tmp_path, 0)
  writer.write("train", 1, {"loss": 1})
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = (tmp_path / "train.csv").stat().st_size + 2  # two bytes of the row
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
  try:
    for step in range(2, 20):  # tensorboardX' queue holds ten
      writer.write("train", step, {"loss": step})
    writer.write_sample(19, "a long text" * 9)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert len(caplog.messages) == 1
  assert f"logs cannot be written to {tmp_path}: " in caplog.text
  writer.write("train", 20, {"loss": 20})
  steps = [str(step) for step in range(1, 21)]
  assert [r["step"] for r in rows(tmp_path / "train.csv")] == steps
  found = [(s, t) for s, t, _ in events(tmp_path / "tensorboard")]
  assert found == [(1, "train/loss"), (20, "train/loss")]
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_deleted_folder_ends_no_run(tmp_path):
  writer = logs.Writer(tmp_path / "w", 0)
  for step in (1, 2, 3):
    writer.write("train", step, {"loss": step})
    writer.write_sample(step, "text")
    if step == 1:
      shutil.rmtree(tmp_path / "w")
  assert [r["step"] for r in rows(tmp_path / "w/train.csv")] == ["2", "3"]
  assert len(list((tmp_path / "w/samples").iterdir())) == 2
  found = events(tmp_path / "w/tensorboard")
  assert {s for s, *_ in found} >= {2, 3} and all(s > 1 for s, *_ in found)
