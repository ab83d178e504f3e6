"""What a run says: it fits the terminal, and cannot end the run."""

import dataclasses
import io
import os
import re
import sys

import numpy as np
import pytest
import rich.console

from mtp_jax import config, sharding
from mtp_jax.data import pipeline
from mtp_jax.train import report, terminal


def test_progress_writes_lines_where_there_is_no_terminal(capsys):
  progress = terminal.Progress()
  progress.start(20, 5)
  progress.advance(6)
  progress.report(10, "loss [1.5]")
  progress.close()
  terminal.Progress(active=False).say("nothing")
  assert capsys.readouterr().out == "step 10/20  loss [1.5]\n"


@pytest.mark.parametrize("width", [80, 100])
def test_only_the_note_gives_way_in_the_bar(width):
  note = "loss 18.060  head 1 5.665 nats  12,345 tokens/s, 11% of it waiting"
  console = rich.console.Console(
    file=io.StringIO(), width=width, force_terminal=True, color_system=None
  )
  bar = terminal.bar(console)
  task = bar.add_task("", total=18000, completed=12600, note=note)
  (line,) = console.render_lines(bar.get_renderable(), pad=False)
  text = "".join(segment.text for segment in line)
  assert len(text) <= width
  assert text.startswith("12600/18000 ")
  assert re.search(r"loss 18\.060 .*… +0:00:00 left -:--:--$", text)
  bar.update(task, note="loss 1")
  (line,) = console.render_lines(bar.get_renderable(), pad=False)
  assert "loss 1 " in "".join(segment.text for segment in line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_output_lacks_are_replaced(monkeypatch, encoding):
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding=encoding)
  monkeypatch.setattr(sys, "stdout", stream)
  terminal.Progress().say("a\udcffb\u2581c\ufffd")
  stream.flush()
  assert re.fullmatch("a.b.c.\n", raw.getvalue().decode(encoding))


def test_an_output_that_is_gone_is_said_once(monkeypatch, caplog):
  """As in `train | head`."""
  read, write = os.pipe()
  os.close(read)
  stream = open(write, "w", encoding="utf-8")
  monkeypatch.setattr(sys, "stdout", stream)
  progress = terminal.Progress()
  progress.start(20, 0)
  for step in range(3):
    progress.advance(step)
    progress.report(step, "loss 1")
  progress.close()
  (said,) = caplog.messages
  assert "standard output cannot be written: [Errno 32] Broken pipe" in said
  stream.close()  # what was in its buffer went elsewhere


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_under_the_output_ends_nothing(monkeypatch, caplog):
  stream = open("/dev/full", "w", encoding="utf-8", buffering=1)
  monkeypatch.setattr(sys, "stdout", stream)
  progress = terminal.Progress()
  progress.say("one")
  progress.say("two")
  assert len(caplog.messages) == 1 and "No space left" in caplog.text
  with pytest.raises(OSError):
    stream.close()


def test_the_first_lines_say_what_was_held_out_and_left_out():
  cfg = config.Config()
  whole = pipeline.Packed(
    np.arange(7), np.array([0]), 1.0, "", 1, {"not UTF-8": 3}
  )
  part = dataclasses.replace(
    whole, cut="the last 5 of 99 bytes of book.txt:1", files=1234
  )
  mesh = sharding.make_mesh(cfg.mesh)
  for split, end in ((whole, "tokens"), (part, f"tokens ({part.cut})")):
    lines = report.settings(cfg, (split, split), mesh)
    corpus = f"corpus: python, {split.files:,} files; left out: 3 not UTF-8"
    assert corpus in lines
    (line,) = (x for x in lines if "held out" in x)
    assert line.endswith(end)
