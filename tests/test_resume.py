"""Resuming: which fields may differ, and how the others are named."""

import dataclasses
import json

from mtp_jax import config
from mtp_jax.train import resume

CONFIG = config.Config(train=config.Train(head_weights=(1.0, 0.5, 0.5, 0.25)))
FREE = """
model.attention data.on_error mesh.data mesh.model decode.heads
decode.max_new train.loss_block train.log_every train.eval_every
train.eval_batches train.finetune
train.sample_tokens train.save_every train.keep
""".split()
LOCAL = "data.path data.tokenizer data.cache data.workers".split()
RATES = """
optim.peak optim.adam_ratio optim.warmup optim.schedule optim.end
train.steps train.max_bad_steps
""".split()


def metadata(**changes):
  cfg = dataclasses.asdict(CONFIG.replace(**changes))
  return {"config": cfg, "tokenizer": "bytes-1", "data": {"train": "3f"}}


def stored(**changes):
  return json.loads(json.dumps(metadata(**changes)))


def test_every_field_is_refused_or_may_change_as_it_declares():
  assert resume.refusals(stored(), metadata()) == []
  for path in config.paths(CONFIG):
    section, name = path.split(".")
    other = metadata(**{section: {name: "another"}})
    for lines, allowed in (
      (resume.refusals(stored(), other), FREE + LOCAL + RATES),
      (resume.disagreements(stored(), other), LOCAL),
    ):
      assert len(lines) == (path not in allowed), (path, lines)
      assert all(x.startswith(f"config.{path}: ") for x in lines)
      assert all(
        x.endswith(" in the first, 'another' in the second") for x in lines
      )
    lines = resume.changes(stored(), other)
    assert len(lines) == (path in RATES), (path, lines)
    assert all(
      x.startswith(f"{path} was ")
      and x.endswith("and is 'another' from here on")
      for x in lines
    )


def test_fingerprints_may_not_change():
  other = metadata() | {"tokenizer": "bytes-2", "data": {"train": "a0"}}
  wanted = ["their tokenizers differ", "their corpora differ"]
  (line,) = resume.refusals(stored(), other)  # of another text, too
  assert "tokenizer differs" in line and "--config.data.tokenizer" in line
  (line,) = resume.refusals(stored(), metadata() | {"data": other["data"]})
  assert line.startswith("the corpus differs: its files have changed")
  assert resume.disagreements(stored(), other) == wanted


def test_processes_start_from_one_model_at_any_path():
  first, other = (
    metadata() | {"init": {"path": path, "fingerprint": "a"}}
    for path in ("/a/llama", "/b/llama")
  )
  assert resume.disagreements(first, other) == []
  line = "init.fingerprint: {!r} in the first, {!r} in the second"
  other["init"]["fingerprint"] = "b"
  assert resume.disagreements(first, other) == [line.format("a", "b")]
  for pair, texts in (
    ((first, metadata()), ("a", None)),
    ((metadata(), first), (None, "a")),
  ):
    assert resume.disagreements(*pair) == [line.format(*texts)]


def test_a_field_that_is_not_stored_had_its_default():
  old = stored()
  del old["config"]["optim"]["clip"], old["config"]["optim"]["peak"]
  del old["config"]["decode"]
  assert resume.refusals(old, metadata()) == []
  assert resume.changes(old, metadata()) == []
  other = metadata(optim={"clip": 2.0, "peak": 0.5})
  assert resume.refusals(old, other) == [
    "config.optim.clip: 1.0 in the first, 2.0 in the second"
  ]
  assert resume.changes(old, other) == [
    "optim.peak was 0.0003 until here, and is 0.5 from here on"
  ]


def test_differences_show_tuples_and_what_is_missing():
  assert resume.differences(
    stored(), metadata(train={"head_weights": ()}) | {"more": {"x": 3}}
  ) == [
    "config.train.head_weights: (1.0, 0.5, 0.5, 0.25) in the first, () in the "
    "second",
    "more.x: None in the first, 3 in the second",
  ]
