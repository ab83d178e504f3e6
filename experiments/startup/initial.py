"""--init: the model that a run starts from, and the config that follows."""

import dataclasses
import pathlib
import typing

import jax

from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints
from mtp_jax.interchange import folders
from mtp_jax.model import model, surgery
from mtp_jax.train import provenance


class Start(typing.NamedTuple):
  """Arguments of `loop.fit`."""

  cfg: config.Config
  init: model.Model | None
  origin: dict | None


def choose(
  cfg: config.Config,
  given: dict[str, typing.Any],
  path: pathlib.Path,
  target: pathlib.Path,
  how: str,
) -> Start:
  """What a run with --init=`path` trains.

  Its model is that of `path`, and so is its tokenizer by default. Flags may
  change the number of heads, pad the vocabulary, and set what changes no array
  (`surgery.SETTINGS`). If there is a run in `target`, it resumes: `path` is not
  read, and the model's shape is that of the run.

  Args:
    cfg: of --config. Its section `model` is used where flags set it.
    given: fields that flags set, by path.
    path: a folder that `mtp_jax.load` reads.
    target: the workdir.
    how: see `surgery.add_heads`.

  Raises:
    ValueError: a flag asks for another shape than that of the model.
  """
  wanted = {
    name.removeprefix("model."): value
    for name, value in given.items()
    if name.startswith("model.")
  }
  resumes = _has_checkpoints(target)
  source = target if resumes else path
  found, _ = folders.settings(source)
  shape = _shape(found.model, wanted, source)
  cfg = dataclasses.replace(cfg, model=shape)
  if "data.tokenizer" not in given:
    cfg = cfg.replace(data={"tokenizer": found.data.tokenizer})
  cfg = cfg.check()
  if resumes:
    return Start(cfg, None, None)
  net, _, _, step = folders.load_step(path, mesh=_host())
  origin = {
    "path": str(path),
    "step": step,
    "fingerprint": provenance.fingerprint(net),
  }
  before, n = net.cfg.n_future, shape.n_future
  if n < before:
    net = surgery.drop_heads(net, n)
    origin["heads"] = f"heads 1 to {n} of {before}"
  elif n > before:
    net = surgery.add_heads(net, n, jax.random.key(cfg.train.seed), how)
    new = (
      f"head {n} is" if n == before + 1 else f"heads {before + 1} to {n} are"
    )
    made = f"copied from head {before}" if how == "copy" else "initialised"
    origin["heads"] = f"{new} new, {made}"
  if shape.vocab > net.cfg.vocab:
    net = surgery.pad_vocab(net, shape.vocab)
  return Start(cfg, surgery.reconfigure(net, shape), origin)


def _host() -> jax.sharding.Mesh:
  """A mesh of one CPU: an accelerator is to hold the run's copy alone."""
  try:
    devices = jax.local_devices(backend="cpu")
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    devices = jax.local_devices()
  return sharding.make_mesh(config.Mesh(data=1, model=1), devices[:1])


def _has_checkpoints(folder: pathlib.Path) -> bool:
  if not (folder / "checkpoints").is_dir():
    return False
  with checkpoints.Checkpoints(folder / "checkpoints") as saved:
    return bool(saved.steps())


def _shape(
  found: config.Model, wanted: dict[str, typing.Any], folder: pathlib.Path
) -> config.Model:
  """The model section: of the model in `folder`, as far as flags allow."""
  shape = found.with_heads(wanted.get("n_future", found.n_future))
  free = ("vocab", *surgery.SETTINGS)
  shape = dataclasses.replace(
    shape, **{name: wanted[name] for name in free if name in wanted}
  )
  for name, value in wanted.items():
    if value != getattr(shape, name):
      raise ValueError(
        f"--config.model.{name}={value}, but the model in {folder} has "
        f"{getattr(shape, name)}: leave it out. With --init, flags may set "
        f"model.n_future, {', model.'.join(free)}"
      )
  if shape.vocab < found.vocab:
    raise ValueError(
      f"--config.model.vocab={shape.vocab}, but the model in {folder} has "
      f"{found.vocab} ids: it can be padded to more, not cut"
    )
  return shape
