"""Claims that compare small models of Python files."""

import dataclasses
import importlib

import jax
import pytest
from conftest import ROOT

from configs.paper import base
from experiments.claims import byte_sweeps
from experiments.claims.byte_level import scales
from experiments.claims.curricula import scales as curricula
from experiments.measure import python_models, sweep, tidy

CLAIMS = (
  *("best_n", "byte_level", "curricula", "epochs", "head_kinds", "model_size"),
)


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("scale", python_models.SIZES)
def test_every_run_is_a_config(claim, scale):
  """Its settings are valid, and no two runs have one name."""
  module = importlib.import_module(f"experiments.claims.{claim}.scales")
  runs = module.runs(scale)
  assert len({(run.name, run.seed) for run in runs}) == len(runs)
  assert {run.claim for run in runs} == {claim}
  for run in runs:
    assert run.overrides["size"] == scale


@pytest.mark.parametrize("claim", sorted({*CLAIMS} - {"curricula"}))
def test_the_papers_runs_are_its_configs(claim, tmp_path, monkeypatch):
  """What they read is looked for before the first begins."""
  module = importlib.import_module(f"experiments.claims.{claim}.scales")
  runs = module.runs("paper")
  assert [run.name for run in runs] == [*module.PAPER]
  trained = []
  monkeypatch.setattr(
    python_models, "figures", lambda *args: trained.append(args) or ()
  )
  for run in runs:
    path, name = run.overrides["config"].split(":")
    assert (ROOT / path).is_file()
    family = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    cfg, heads = run.measure.args
    assert cfg == family.get_config(name)
    # What trains is what was planned: a row per chip (here one CPU or more).
    assert not [*run.measure(tmp_path)]
    planned = base.one_row_per_chip(cfg, jax.device_count())
    assert trained.pop() == (planned, tmp_path, heads)
  monkeypatch.chdir(tmp_path)
  missing = "data.path 'data/code' does not exist"
  if claim != "byte_level":
    missing = "tokenizer 'data/tokenizer.model' is neither"
  with pytest.raises(ValueError, match=f"{missing}.* says what it reads"):
    sweep.run(runs, tmp_path / "out")


def test_heads_are_counted_up_to_those_of_the_model():
  asked = [run.measure.args[1] for run in scales.runs("paper")]
  assert asked[0] == () and asked[1] == (2, 4, 8)
  assert asked[3] == scales.DECODED


def test_runs_differ_in_what_they_say():
  cfg = python_models.make("cpu", {"model": {"n_future": 2}}, seed=3)
  other = python_models.make("cpu", {"model": {"n_future": 2}})
  assert (cfg.train.seed, cfg.data.seed) == (3, 3)
  assert dataclasses.replace(cfg, train=other.train, data=other.data) == other
  assert cfg.data.seq_len == 128 and cfg.train.sample_tokens == 0
  run = python_models.run("x", "n", "cpu", {"model": {"width": 48}}, seed=1)
  assert run.overrides == {"size": "cpu", "model.width": 48}


def test_forward_and_reverse_are_mirrored():
  def stages(name):
    weights = curricula.CURRICULA[name]["train"]["head_weights"]
    return [sum(weights[i : i + 4]) for i in range(0, 16, 4)]

  assert stages("forward") == [1, 2, 3, 4] == stages("reverse")[::-1]


@pytest.mark.slow
def test_a_claim_at_scale_test(tmp_path, call):
  module = "experiments.claims.byte_level"
  code, out, err = call("--scale=test", f"--output={tmp_path}", module=module)
  assert code == 0 and "2 runs done" in out, out + err
  rows = tidy.read(tmp_path)
  assert {row.run for row in rows} == {f"n={n}" for n in scales.HEADS["test"]}
  last = {(row.run, row.metric): row.value for row in byte_sweeps.final(rows)}
  assert 7 < last["n=1", "bits_per_byte_1"] < 9
  # All heads at once, and by k: the same measure on the same text.
  assert last["n=2", "tokens per forward k=2"] == pytest.approx(
    last["n=2", byte_sweeps.SPEED], rel=1e-6
  )
  assert byte_sweeps.table(rows) in out
  assert "| bits per byte, head | 1 | 2 |" in out
  assert (tmp_path / "sweep_loss.png").stat().st_size > 1000
