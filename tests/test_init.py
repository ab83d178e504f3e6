"""Runs that start from a model: `loop.fit(init=...)`, `train --init=...`."""

import dataclasses
import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest

import mtp_jax
from experiments.startup import initial
from mtp_jax import config, sharding, tokenizer
from mtp_jax.checkpoint import checkpoints
from mtp_jax.model import surgery
from mtp_jax.train import loop, provenance, workdir
from mtp_jax.train import step as step_lib
from tests import parameters, runs, tokenizer_files
from tests.test_train import bits

GIVEN = {"model.n_future": 3, "train.freeze": "trunk", "train.steps": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a config file and `source`, step 7 of a next-token model."""
  folder = runs.make(tmp_path_factory.mktemp("run"))
  cfg = config.load(folder / "config.json").replace(
    optim={"warmup": 1, "kind": "muon"}, train={"steps": 2, "eval_every": 2}
  )
  (folder / "config.json").write_text(config.to_json(cfg))
  shape = parameters.model_config(vocab=259, n_future=1, layers=2)
  cfg = dataclasses.replace(cfg, model=shape).check()
  state = step_lib.init_state(
    cfg, sharding.make_mesh(cfg.mesh), parameters.model_of(shape, 0.3)
  )
  record = {
    "config": dataclasses.asdict(cfg),
    "tokenizer": tokenizer.Bytes().fingerprint,
  }
  with checkpoints.Checkpoints(folder / "source" / "checkpoints") as saved:
    saved.save(7, state, record)
  (folder / "source" / "LICENSE").write_text("Use it well.")
  (folder / "source" / "README.md").write_text("---\nlicense: x\n---\nTheirs.")
  return folder


def start(home, target, **given):
  """What --init of `source` makes of the config file and flags."""
  given = GIVEN | {k.replace("__", "."): v for k, v in given.items()}
  cfg = config.load(home / "config.json")
  for name, value in given.items():
    section, field = name.split(".")
    cfg = cfg.replace(**{section: {field: value}})
  return initial.choose(cfg, given, home / "source", target, "copy")


@pytest.fixture(scope="module")
def trained(home):
  """Config and first model of a frozen run of two steps."""
  found, models = start(home, home / "run"), []

  def read():
    models.append(found.init())
    return models[0]

  loop.fit(found.cfg, home / "run", init=read)
  return found.cfg, models[0][0]


@pytest.mark.slow
def test_the_run_is_that_of_the_model_with_more_heads(home, trained):
  source, theirs, _ = workdir.load(home / "source")
  net, cfg, _ = workdir.load(home / "run")
  assert cfg.model == theirs.model.with_heads(3)
  assert (cfg.model.layers, cfg.model.trunk_layers) == (4, 1)
  first = surgery.drop_heads(net, 1)
  assert bits(first) == bits(source)
  old, new = surgery.trainable(trained[1]), surgery.trainable(net)
  for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
    assert all((x != y).any() for x, y in zip(a, b, strict=True))
  # Training donates its state: the caller's arrays were not part of it.
  again, _ = start(home, home).init()
  assert bits(trained[1]) == bits(again)
  with checkpoints.Checkpoints(home / "run" / "checkpoints") as saved:
    origin = saved.metadata()["init"]
  assert origin == {
    "path": str(home / "source"),
    "step": 7,
    "fingerprint": provenance.fingerprint(source),
    "heads": "heads 2 to 3 are new, copied from head 1",
  }


def test_its_text_is_that_of_the_model(home, trained):
  """Drafted by the new heads, and written by the old one without a cache."""
  text = (home / "run/samples/000002.txt").read_bytes()
  prompt, _, written = text.partition(b"[...]")
  net, _, codec = workdir.load(home / "source")
  ids = [*codec.encode(prompt)]
  if len(ids) < 15:  # half a window, of which a document's start has no text
    ids = [codec.bos, *ids]
  row, begin = np.zeros((1, 32), np.int32), len(ids)
  row[0, :begin] = ids
  best = jax.jit(lambda net, row: net(row)[0, 0].argmax(-1))
  for end in range(begin, begin + 11):
    row[0, end] = best(net, row)[end - 1]
  want = codec.decode(row[0, begin : end + 1])
  assert written.decode() == f"{want}\n" and len(set(want)) > 1


def test_it_resumes_without_the_model(home, trained, capsys):
  shutil.copytree(home / "run", home / "again")
  (home / "source").rename(home / "moved")
  try:
    found = start(home, home / "again")
  finally:
    (home / "moved").rename(home / "source")
  assert found == initial.Start(trained[0], None)
  loop.fit(found.cfg, home / "again", init=trained[1])
  said = capsys.readouterr().out
  assert "heads 2 to 3 are trained" in said
  assert f"resuming from step 2\nweights: {home}/source, step 7" in said
  assert "the model that was given to start from is not used" in said
  other = found.cfg.replace(train={"freeze": "none"})
  line = "train.freeze: 'trunk' in the first, 'none' in the second"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    loop.fit(other, home / "again")
  # A frozen run without `init` goes on too.
  other = found.cfg.replace(train={"seed": 9})
  with pytest.raises(checkpoints.CheckpointError, match="train.seed"):
    loop.fit(other, home / "again")


def test_licences_reach_what_is_made_of_the_run(home, trained, tmp_path):
  net, *_ = workdir.load(home / "run")
  mtp_jax.save(net, tmp_path / "out", like=home / "run")
  assert (tmp_path / "out" / "LICENSE").read_text() == "Use it well."
  assert "Theirs." in (tmp_path / "out" / "README.original.md").read_text()
  card = (tmp_path / "out" / "README.md").read_text()
  assert "license: x\n" in card
  assert "of that model, the model card is `README.original.md`" in card


@pytest.mark.parametrize(
  "train, words",
  [
    ({"freeze": "trunk"}, "one is random: give --init=PATH"),
    ({"finetune": True}, "finetune is on, and this run would begin at random"),
  ],
)
def test_what_needs_a_model_does_not_begin_at_random(
  home, tmp_path, monkeypatch, train, words
):
  monkeypatch.setattr(loop.pipeline, "pack", None)  # refused before any work
  cfg = config.load(home / "config.json").replace(train=train)
  with pytest.raises(ValueError, match=words):
    loop.fit(cfg, tmp_path / "w")


def test_the_model_is_read_last_and_not_kept(home, tmp_path, monkeypatch):
  found, read = start(home, tmp_path / "w"), []

  def init():
    net, origin = found.init()
    read.append(weakref.ref(net.embed[...]))
    return net, origin

  def run(self, state, *_):
    gc.collect()
    assert read[0]() is None
    return state

  monkeypatch.setattr(loop._Loop, "run", run)
  with monkeypatch.context() as patch:
    patch.setattr(loop.pipeline, "pack", None)
    with pytest.raises(TypeError):
      loop.fit(found.cfg, tmp_path / "w", init=init)
  assert not read
  loop.fit(found.cfg, tmp_path / "w", init=init)
  assert len(read) == 1


def test_hosts_may_keep_the_model_at_different_paths(
  home, tmp_path, monkeypatch
):
  found = start(home, tmp_path / "w")

  def gather(text):
    other = json.loads(text)
    if "init" in other:
      other["init"] |= {"path": "/elsewhere", "fingerprint": "0"}
    return [text, json.dumps(other)]

  monkeypatch.setattr(loop.processes, "gather", gather)
  line = (
    "same run: init.fingerprint: '.*' in the first, '0' in the second. Start"
  )
  with pytest.raises(ValueError, match=line):
    loop.fit(found.cfg, tmp_path / "w", init=found.init)


def test_what_flags_may_change(home, tmp_path):
  found = start(home, tmp_path, model__vocab=264, model__dtype="bfloat16")
  assert found.init()[0].cfg == found.cfg.model
  assert (found.cfg.model.vocab, found.cfg.model.dtype) == (264, "bfloat16")
  for given, line in (
    ({"model__width": 48}, "model.width=48, but the model in .*source has 24"),
    ({"model__vocab": 200}, "vocab=200, but the model in .* has 259 ids"),
    ({"train__head_weights": (1.0,)}, "1 entries for model.n_future=3"),
  ):
    with pytest.raises(ValueError, match=line):
      start(home, tmp_path, **given)


def test_finetuning_head_1_alone_starts_afresh(home, trained, tmp_path):
  """n' = 1 after n = 3: heads are dropped, and nothing of the optimiser."""
  cfg = config.load(home / "config.json").replace(optim={"peak": 1e-5})
  given = {"model.n_future": 1}
  found = initial.choose(cfg, given, home / "run", tmp_path, "copy")
  net, origin = found.init()
  assert bits(net) == bits(workdir.load(home / "source")[0])
  assert (origin["heads"], origin["step"]) == ("head 1 of 3", 2)
  assert found.cfg.optim.peak == 1e-5 and found.cfg.model == net.cfg
  mesh = sharding.make_mesh(found.cfg.mesh)
  state = step_lib.init_state(found.cfg, mesh, net)
  assert int(state.step) == 0
  moments = [a for a in jax.tree.leaves(state.opt) if a.ndim > 1]
  assert moments and not any(np.asarray(a).any() for a in moments)


@pytest.mark.parametrize(
  "given, shape, said",
  [
    ({"n_future": 4}, (7, 3), "heads 2 to 4 are new, copied from head 1"),
    (
      {"n_future": 4, "layers": 5},
      (5, 1),
      "heads 2 to 4 are new, copied from head 1; the last 2 layers of the "
      "trunk are left out",
    ),
    (
      {"n_future": 4, "head": "linear"},
      (4, 4),
      "heads 1 to 4 are new, linear, the identity",
    ),
  ],
)
def test_the_shapes_of_table_s6(home, tmp_path, given, shape, said):
  """Heads on a next-token model: more layers, as many as before, or none."""
  net = parameters.random_model(vocab=259, n_future=1, layers=4)
  mtp_jax.save(net, tmp_path / "llama", codec=tokenizer.Bytes())
  given = {f"model.{name}": value for name, value in given.items()}
  cfg = config.load(home / "config.json")

  def choose(given):
    where = tmp_path / "llama", tmp_path / "w"
    return initial.choose(cfg, given, *where, "copy")

  found = choose(given)
  (tmp_path / "w").mkdir()
  made, origin = found.init()
  assert made.cfg == found.cfg.model and origin["heads"] == said
  assert (made.cfg.layers, made.cfg.trunk_layers) == shape
  for wrong, line in (
    ({"model.layers": 8}, "layers=8, but the model in .*llama has 7"),
    ({"model.head": "causal"}, "head=causal, but the model in .*'linear' on a"),
  ):
    with pytest.raises(ValueError, match=line):
      choose({"model.n_future": 4} | wrong)


def test_a_config_files_number_of_heads_is_told(home, tmp_path, caplog):
  """Only a flag changes the number. The default of the file may be no wish."""
  cfg = config.load(home / "config.json")
  where = home / "source", tmp_path / "new"
  line = "has model.n_future=2, the model in .*source 1: say .*_future=2"
  with pytest.raises(ValueError, match=line):
    initial.choose(cfg.replace(model={"n_future": 2}), {}, *where, "copy")
  caplog.set_level("WARNING")
  for n, told in ((1, 0), (config.Model.n_future, 1)):
    found = initial.choose(
      cfg.replace(model={"n_future": n}), {}, *where, "copy"
    )
    assert found.cfg.model.n_future == 1 and len(caplog.messages) == told


def test_another_tokenizer_than_the_models_is_refused(home, tmp_path):
  files = tokenizer_files.write(
    tmp_path / "theirs",
    tokenizer_files.train("byte_level"),
    tokenizer_config=tokenizer_files.NAMES,
  )
  both = f"{files} has fingerprint .*source has {tokenizer.Bytes().fingerprint}"
  with pytest.raises(ValueError, match=f"{both}: .*; leave out --config.data"):
    start(home, tmp_path, data__tokenizer=str(files))
  start(home, tmp_path, data__tokenizer="bytes")


def test_a_run_that_began_with_another_model_says_so(home, trained, caplog):
  """A run goes on with its own model, whatever --init names then."""
  cfg = config.load(home / "config.json")
  caplog.set_level("WARNING")
  initial.choose(cfg, GIVEN, home / "source", home / "run", "copy")
  assert not caplog.messages
  initial.choose(cfg, GIVEN, home / "typo", home / "run", "copy")
  (line,) = caplog.messages
  assert line == (
    f"--init={home}/typo is not used: the run in {home}/run goes on, which "
    f"began with {home}/source"
  )


def test_a_run_that_resumes_without_its_init_is_told(home, trained, tmp_path):
  shutil.copytree(home / "run", tmp_path / "run")
  cfg = config.load(home / "config.json")
  cfg = cfg.replace(train={"steps": 2}, model={"width": 16}).check()
  line = f"the run began with --init={home}/source, .* give it again"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    loop.fit(cfg, tmp_path / "run")


def test_weights_are_checked_before_the_corpus_is_read(home, tmp_path, call):
  net = parameters.random_model(vocab=259, n_future=1)
  mtp_jax.save(net, tmp_path / "llama", codec=tokenizer.Bytes())
  file = tmp_path / "llama" / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1])
  code, _, err = call(
    f"--config={home}/config.json",
    f"--workdir={tmp_path}/w",
    f"--init={tmp_path}/llama",
    "--config.model.n_future=3",
  )
  assert code == 1 and "no whole safetensors file" in err
  assert err.count("\n") == 1 and not (tmp_path / "w").exists()


def test_a_run_does_not_start_from_its_own_workdir(home, trained, tmp_path):
  cfg = config.load(home / "config.json")
  (tmp_path / "link").symlink_to(home / "run")
  line = f"--init and --workdir are both {tmp_path}/link: .* another --workdir"
  with pytest.raises(ValueError, match=line):
    initial.choose(cfg, GIVEN, home / "run", tmp_path / "link", "copy")


def test_a_run_replaces_no_model_of_others(home, tmp_path):
  net = parameters.random_model(vocab=259, n_future=1)
  mtp_jax.save(net, tmp_path / "llama", codec=tokenizer.Bytes())
  before = sorted(path.name for path in (tmp_path / "llama").iterdir())
  with pytest.raises(ValueError, match="llama holds a model of Hugging Face"):
    loop.fit(config.load(home / "config.json"), tmp_path / "llama")
  assert sorted(p.name for p in (tmp_path / "llama").iterdir()) == before


def test_the_config_file_sets_what_changes_no_array(home, tmp_path):
  model = {"remat": "full", "mask_documents": False, "dtype": "bfloat16"}
  cfg = config.load(home / "config.json").replace(
    model=model | {"n_future": config.Model.n_future}
  )
  given = {"model.dtype": "bfloat16"}
  found = initial.choose(cfg, given, home / "source", tmp_path, "copy")
  source, _ = workdir.settings(home / "source")
  assert found.cfg.model == dataclasses.replace(
    source.model, remat="full", mask_documents=False, dtype="bfloat16"
  )
  net, origin = found.init()
  assert net.cfg == found.cfg.model
  line = "; model.remat 'full', model.mask_documents False of the config file"
  assert provenance.sentence(origin).endswith(line)


def test_fit_refuses_another_model_before_any_work(home, tmp_path, monkeypatch):
  monkeypatch.setattr(loop.pipeline, "pack", None)  # not even read
  found = start(home, tmp_path)
  net, _ = found.init()
  for cfg, line in (
    (found.cfg.replace(model={"mlp": 80}), "model.mlp 41 in the model, 80 in"),
    (
      dataclasses.replace(found.cfg, model=found.cfg.model.with_heads(1)),
      "trains heads 2..N, and model.n_future is 1",
    ),
  ):
    with pytest.raises(ValueError, match=line):
      loop.fit(cfg, tmp_path / "w", init=net)


def test_the_program_takes_it(home, call):
  code, _, err = call(
    f"--config={home}/config.json",
    f"--workdir={home}/w",
    f"--init={home}/source",
    "--config.model.layers=9",
  )
  assert code == 1
  assert err.startswith("error: --config.model.layers=9, but the model in ")
