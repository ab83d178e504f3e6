"""What a run keeps in its folder, and how a trained model is taken out."""

import dataclasses
import pathlib
import shutil

import jax

from mtp_jax import checkpoint, config, sharding, train
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.data import pipeline
from mtp_jax.model import model

# What may differ between a run and the checkpoint that it goes on from: where
# things lie and how often they are written, not what is computed.
_FREE = {
  "data": ("path", "cache", "workers", "tokenizer"),
  "model": ("attention",),
  "train": (
    "log_every eval_every eval_batches sample_tokens save_every keep loss_block"
  ).split(),
}


def load(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer]:
  """A trained model with what it takes to use it.

  Args:
    workdir: of a run of `run.fit`.
    step: of the checkpoint; None takes the newest whole one.

  Returns:
    (model.Model, config.Config, tokenizer), the parameters on this process's
    first device, whatever mesh they were trained on. While reading, Adam's
    moments lie there too.

  Raises:
    checkpoint.CheckpointError: there is no such checkpoint.
    ValueError: the tokenizer's model file is missing or another one.
  """
  workdir = pathlib.Path(workdir).expanduser()
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    record = saved.metadata(step)
    cfg = config.from_dict(record["config"])
    codec = tokenizer(cfg, workdir)
    if codec.fingerprint != record["tokenizer"]:
      raise ValueError(
        f"tokenizer {cfg.data.tokenizer} has fingerprint {codec.fingerprint}; "
        f"the model was trained with {record['tokenizer']}"
      )
    mesh = sharding.make_mesh(
      config.Mesh(data=1, model=1), jax.local_devices()[:1]
    )
    state, _, _ = saved.restore(train.abstract_state(cfg, mesh), step=step)
  return state.model, cfg, codec


def tokenizer(
  cfg: config.Config, workdir: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """The run's tokenizer; a model file is copied, so that a workdir is whole.

  Raises:
    ValueError: no such tokenizer, or more ids than `model.vocab`.
  """
  copy = workdir / "tokenizer.model"
  if cfg.data.tokenizer == "bytes":
    codec = tokenizer_lib.Bytes()
  elif copy.exists():
    codec = tokenizer_lib.load(str(copy))
  else:
    codec = tokenizer_lib.load(cfg.data.tokenizer)
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      partial = copy.with_suffix(".partial")  # others may look for it now
      shutil.copy(pathlib.Path(cfg.data.tokenizer).expanduser(), partial)
      partial.rename(copy)
  if cfg.model.vocab < codec.vocab:
    raise ValueError(
      f"model.vocab {cfg.model.vocab} is smaller than the {codec.vocab} ids of "
      f"tokenizer {cfg.data.tokenizer!r}: set --config.model.vocab="
      f"{codec.vocab} or more"
    )
  return codec


def metadata(
  cfg: config.Config,
  codec: tokenizer_lib.Tokenizer,
  packed: tuple[pipeline.Packed, pipeline.Packed],
) -> dict:
  """What a checkpoint says of its run: config and fingerprints."""
  return {
    "config": dataclasses.asdict(cfg),
    "tokenizer": codec.fingerprint,
    "data": {
      "train": packed[0].fingerprint,
      "held_out": packed[1].fingerprint,
    },
  }


def fixed(metadata: dict) -> dict:
  """The part of `metadata` that a run may not change when it goes on."""
  sections = {
    section: {
      name: value
      for name, value in fields.items()
      if name not in _FREE.get(section, ())
    }
    for section, fields in metadata["config"].items()
    if section not in ("mesh", "decode")
  }
  return metadata | {"config": sections}


def shared(metadata: dict) -> dict:
  """The part of `metadata` that all processes of a run have in common."""
  config = metadata["config"]
  own = _FREE["data"]  # places on each host
  data = {k: v for k, v in config["data"].items() if k not in own}
  return metadata | {"config": config | {"data": data}}
