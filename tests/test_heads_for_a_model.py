"""`experiments.claims.heads_for_a_model`, on a tiny model of bytes."""

import gzip
import json
import sys
import types

import forked
import jax
import numpy as np
import pytest

import mtp_jax
from experiments import measure
from experiments.claims.heads_for_a_model import (
  corpora,
  decoding,
  report,
  scales,
  training,
)
from mtp_jax import config, tokenizer
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import packed
from mtp_jax.model import model, surgery

PEER = "transformers"
SHAPE = config.Model(
  width=16, mlp=24, layers=2, attn_heads=2, kv_heads=2, n_future=1
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(folder of results, model that got the heads), after the whole program."""
  home = tmp_path_factory.mktemp("heads")
  net = model.Model(SHAPE, jax.random.key(0))
  mtp_jax.save(net, home / "llama", codec=tokenizer.Bytes())
  folder = home / "found"
  folder.mkdir()
  with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
    for name in "fg":
      file.write(json.dumps({"prompt": f"def {name}(x):\n  "}) + "\n")
  run(home)
  return folder, net


def run(home, *more, code=0) -> str:
  process = forked.Process(
    [
      *("-m", "experiments.claims.heads_for_a_model", "--scale=test"),
      "--heads=3",
      *(f"--model={home}/llama", f"--output={home}/found", *more),
    ],
    HOME=str(home),
  )
  out, err = process.communicate()
  assert process.returncode == code, err
  return out + err


@pytest.mark.slow
def test_heads_are_trained_and_decode_the_models_text(finished):
  folder, net = finished
  for name in ("files", "written"):
    found = json.loads((folder / name / "results.json").read_text())
    heads, _, _ = mtp_jax.load(folder / name / "model")
    assert heads.cfg.n_future == 3
    kept = jax.tree.leaves(surgery.drop_heads(heads, 1))
    for a, b in zip(kept, jax.tree.leaves(net), strict=True):
      np.testing.assert_array_equal(a, b)
    layers = jax.tree.leaves(heads.heads.layers)
    assert all((a[1] != a[0]).any() for a in layers)  # no more a copy
    assert set(found["decoding"]) == {"files, 1", "humaneval, 1"}
    for rows in found["decoding"].values():
      assert {"ordinary", "chain 2", "chain 3"} <= set(rows)
      same = [row["same_texts"] for row in rows.values()]
      assert all(s["same"] == s["of"] == 2 for s in same)
    assert [e["heads"] for e in found["completions"]] == [1, 2, 3]
    page = (folder / name / "report.html").read_text()
    assert "identical" in page
  assert (folder / "heads_for_a_model.png").stat().st_size > 1000


@pytest.mark.slow
def test_what_is_done_is_not_done_again(finished):
  """The other corpus keeps its place in the tables."""
  folder, _ = finished
  (folder / "files" / "results.json").unlink()
  kept = [*folder.glob("*/model/model.safetensors")]
  before = [file.stat().st_mtime_ns for file in kept]
  out = run(folder.parent, "--corpora=files")
  assert "| files | 1 |" in out and "| written | 1 |" in out
  out = run(folder.parent, "--corpora=files", "--dtype=bfloat16")
  assert "| files | 1 |" in out and "| written | 1 |" not in out
  assert [file.stat().st_mtime_ns for file in kept] == before
  for place, dtype in ((folder, "float32"), (folder / "bfloat16", "bfloat16")):
    found = json.loads((place / "files" / "results.json").read_text())
    assert found["dtype"] == dtype


@pytest.mark.slow
def test_heads_of_other_settings_are_not_taken(finished):
  folder, _ = finished
  line = "was made with seed 0, and 1 is asked for: name another --output"
  assert line in run(folder.parent, "--seed=1", code=1)
  records = [*folder.glob("*/training.json")]
  for record in records:  # as if no heads had been trained on the texts yet
    record.rename(record.with_suffix(".aside"))
  try:
    found = run(folder.parent, "--seed=1", code=1)
  finally:
    for record in records:
      record.with_suffix(".aside").rename(record)
  assert f"written.json {line}" in found


def test_transformers_reads_no_workdir(tmp_path, monkeypatch):
  read = []
  peer = types.SimpleNamespace(
    load=lambda path, dtype: read.append(dtype), decode=print
  )
  monkeypatch.setitem(sys.modules, "experiments.measure.peer", peer)
  monkeypatch.setattr(measure, "peer", peer, raising=False)
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  for kind, found in ("workdir", []), ("meta", []), ("hugging_face", [PEER]):
    monkeypatch.setattr(decoding.folders, "kind", lambda path, kind=kind: kind)
    assert [*decoding.peer(tmp_path, "bfloat16")] == found
  assert read == ["bfloat16"]


def test_the_demo_compares_nothing(tmp_path):
  scale = scales.SCALES["demo"]
  held = packed.Packed(
    tokens=np.arange(999) % 7,
    starts=np.arange(0, 999, 200),
    bytes_per_token=1.0,
    fingerprint="",
    documents=5,
    skipped={},
  )
  texts = decoding.prompts(held, tokenizer.Bytes(), None, scale)
  assert [len(p) for p in texts["files"]] == [scale.prompt_len] * scale.prompts
  decoder = mtp_jax.lay_out(model.Model(SHAPE, jax.random.key(0)))
  texts["humaneval"] = [np.arange(3), np.arange(4)]
  assert not decoding.measure(decoder, texts, [], scale, {})
  report.write_picture(tmp_path, {"files": {"decoding": {}}})
  assert not [*tmp_path.iterdir()]


def test_texts_that_a_kill_cut_are_drawn_again(tmp_path):
  file = tmp_path / "w.jsonl.partial"
  assert corpora._whole_lines(file) == []
  file.write_text('{"number": 3, "text": ""}\n{"number": 4, "te')
  assert corpora._whole_lines(file) == ['{"number": 3, "text": ""}\n']


def test_other_ids_are_no_targets():
  tokens = np.array([[5, 9, 7, 5]])
  batch = training.renumbered(batch_lib.of(tokens), np.array([5, 7]))
  assert batch.tokens.tolist() == [[0, 0, 1, 0]]
  assert batch.weight.tolist() == [[1, 0, 1, 1]]
