"""Workdirs: what a run keeps there, and what is read back."""

import dataclasses
import errno
import os
import pathlib

import jax.numpy as jnp
import pytest

from mtp_jax import config, tokenizer, tokenizer_training
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import workdir
from tests import tokenizer_files


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Two files of SentencePiece models."""
  folder = tmp_path_factory.mktemp("models")
  for name, vocab in (("a.model", 290), ("b.model", 285)):
    text = [f"def f(x):\n  return {name}\n" * 9]
    tokenizer_training.train(text, folder / name, vocab)
  return folder


def settings(name, vocab=300):
  return config.Config(
    model=config.Model(vocab=vocab), data=config.Data(tokenizer=str(name))
  )


def test_a_refused_start_leaves_no_tokenizer(models, tmp_path):
  """So that the next one trains with the tokenizer that it names."""
  target = tmp_path / "w"
  with pytest.raises(ValueError, match="model.vocab 280 .* 290 ids"):
    workdir.tokenizer(settings(models / "a.model", 280), target)
  assert not target.exists()
  codec = workdir.tokenizer(settings(models / "b.model"), target)
  assert (
    codec.fingerprint == tokenizer.load(str(models / "b.model")).fingerprint
  )


def test_a_run_keeps_its_tokenizer(models, tmp_path):
  original = tmp_path / "a.model"
  original.write_bytes((models / "a.model").read_bytes())
  target = tmp_path / "w"
  target.mkdir()
  workdir.write_settings(settings(original), target)
  assert sorted(p.name for p in target.iterdir()) == [
    "config.json",
    "tokenizer.model",
  ]
  fingerprint = tokenizer.load(str(original)).fingerprint
  other = tokenizer.load(str(models / "b.model")).fingerprint
  line = f"b.model' has fingerprint {other}, the run in .* has {fingerprint}"
  with pytest.raises(ValueError, match=f"{line}: take another workdir"):
    workdir.tokenizer(settings(models / "b.model"), target)
  original.unlink()
  for name in (original, target / "tokenizer.model", models / "a.model"):
    codec = workdir.tokenizer(settings(name), target)
    assert codec.fingerprint == fingerprint
  with pytest.raises(ValueError) as error:
    workdir.tokenizer(settings(tmp_path / "typo.model"), target)
  for text in ("no tokenizer '", "typo.model'", f"began with '{original}'"):
    assert text in str(error.value)


def test_a_damaged_tokenizer_is_replaced_or_its_remedy_told(
  models, tmp_path, caplog
):
  cfg, copy = settings(models / "a.model"), tmp_path / "tokenizer.model"
  whole = (models / "a.model").read_bytes()
  fingerprint = tokenizer.load(cfg.data.tokenizer).fingerprint
  record = {"config": dataclasses.asdict(cfg), "tokenizer": fingerprint}
  with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
    saved.save(1, {"w": jnp.ones(3)}, record)
  copy.write_bytes(b"x" * 50)
  remedy = f"put the tokenizer of fingerprint {fingerprint} at {copy}"
  for name in ("b.model", "gone.model"):
    with pytest.raises(ValueError, match=f"not a SentencePiece .*{remedy}"):
      workdir.tokenizer(settings(models / name), tmp_path)
  with pytest.raises(ValueError, match=f"not a SentencePiece .*{remedy}"):
    workdir.settings(tmp_path)
  assert copy.read_bytes() == b"x" * 50 and not caplog.messages
  codec = workdir.tokenizer(cfg, tmp_path)
  assert codec.fingerprint == fingerprint
  assert f"a copy of {models / 'a.model'} replaces it" in caplog.text
  workdir.write_settings(cfg, tmp_path)
  assert copy.read_bytes() == whole
  copy.write_bytes((models / "b.model").read_bytes())
  with pytest.raises(ValueError, match=f"was trained with .*: {remedy}"):
    workdir.settings(tmp_path)


def test_a_run_keeps_its_tokenizer_json(tmp_path, caplog):
  """And what is said beside it, so that the copy loads alone."""
  fields = tokenizer_files.train("byte_level")
  said = {
    "tokenizer_config": tokenizer_files.NAMES | {"chat_template": "{{ x }}"},
    "generation_config": {"eos_token_id": [2, 3]},
  }
  source, target = tmp_path / "source", tmp_path / "w"
  tokenizer_files.write(source, fields, **said)
  target.mkdir()
  workdir.write_settings(settings(source, 400), target)
  assert sorted(p.name for p in target.iterdir()) == [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  given = tokenizer.load(str(source))
  source.rename(tmp_path / "moved")
  copy = workdir.tokenizer(settings(source, 400), target)
  assert copy.fingerprint == given.fingerprint and copy.ends == (2, 3)
  assert copy.special == given.special and copy.special.template == "{{ x }}"
  other = tmp_path / "other"
  end = tokenizer_files.NAMES | {"eos_token": "<|end|>"}
  tokenizer_files.write(other, fields, tokenizer_config=end)
  for name in (other, other / "tokenizer.json"):
    line = "other.*' has fingerprint .*: take another workdir, or --config.data"
    with pytest.raises(ValueError, match=line):
      workdir.tokenizer(settings(name, 400), target)
  (target / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="put the tokenizer that the run began"):
    workdir.tokenizer(settings(source, 400), target)
  cfg = settings(tmp_path / "moved", 400)
  assert workdir.tokenizer(cfg, target).special == given.special
  assert f"a copy of {tmp_path / 'moved'} replaces it" in caplog.text
  workdir.write_settings(cfg, target)
  assert tokenizer.load(str(target)).special == given.special


def test_settings_that_cannot_be_written(tmp_path, monkeypatch):
  def write_bytes(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
  line = f"cannot write to workdir {tmp_path}: .*; free space there, or take"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    workdir.write_settings(settings("bytes"), tmp_path)


def test_a_workdir_without_a_run_names_what_may_be_meant(tmp_path):
  (tmp_path / "runs/mine/checkpoints/375").mkdir(parents=True)
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("")
  mine = tmp_path / "runs" / "mine"
  meant = f"Did you mean {mine}?"
  for path, texts in {
    "runs/mine/checkpoints": ("has no folder", meant),
    "runs/mine/checkpoints/375": ("has no folder", meant),
    "runs/mine/checkpoints/400": ("does not exist", meant),
    "runs": ("has no folder", meant),
    "runs/mime": ("does not exist", meant),
    "file": ("is a file",),
    "nowhere/at all": ("does not exist",),
    "empty": ("has no folder `checkpoints`",),
  }.items():
    with pytest.raises(checkpoints.CheckpointError) as error:
      workdir.load(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)
    for text in texts:
      assert text in str(error.value)
    assert ("Did you mean" in str(error.value)) == (meant in texts)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"3", b"[" * 100_000])
def test_a_config_that_cannot_be_read_is_none(tmp_path, text):
  (tmp_path / "config.json").write_bytes(text)
  workdir.check_format(tmp_path)  # a run replaces it
