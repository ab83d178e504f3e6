"""Models of folders that a run starts from, --init, or that are planned."""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable, Collection

import jax
from absl import logging

from experiments.startup import options
from mtp_jax import config, sharding, tokenizer
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.interchange import folders, model_card
from mtp_jax.model import heads, model, surgery, vocabulary
from mtp_jax.train import provenance, workdir


class Start(typing.NamedTuple):
  """Arguments of `loop.fit`."""

  cfg: config.Config
  init: Callable[[], tuple[model.Model, dict]] | None


def choose(
  cfg: config.Config,
  given: dict[str, typing.Any],
  path: pathlib.Path,
  target: pathlib.Path,
  how: str,
) -> Start:
  """What a run with --init=`path` trains.

  Its model is that of `path`, and so is its tokenizer by default. Flags may
  change the number of heads, leave out layers of the trunk, put linear heads on
  a next-token model, pad the vocabulary, and set what changes no array
  (`surgery.SETTINGS`). The config file may do only the last of these, where it
  differs from the defaults; a number of heads of its own is refused. If there
  is a run in `target`, it resumes: `path` is not read, and the model's shape is
  that of the run.

  `Start.init` reads the model. Licences and the model card are then copied
  into `target`.

  Args:
    cfg: of --config, with its flags. Of its section `model`, the above is used.
    given: fields that flags set, by path.
    path: a folder that `mtp_jax.load` reads.
    target: the workdir.
    how: see `surgery.add_heads`.

  Raises:
    ValueError: a flag asks for another shape than that of the model, or for
      another tokenizer; the config file asks for another number of heads;
      `path` is `target`.
  """
  if path.resolve() == target.resolve():
    raise ValueError(
      f"--init and --workdir are both {target}: a run resumes with the --init "
      "that it began with, if any, and a new one that starts from the model "
      "there needs another --workdir"
    )
  wanted = {
    name.removeprefix("model."): value
    for name, value in given.items()
    if name.startswith("model.")
  }
  resumes = workdir.has_checkpoints(target)
  source = target if resumes else path
  found, codec = folders.settings(source)
  shape = _shape(found.model, wanted, source)
  if not resumes:
    folders.check_weights(path)
  default = cfg.model.n_future == config.Model.n_future
  # `surgery.trainable` refuses a frozen trunk with one head.
  refused = default and cfg.train.freeze == "trunk" and shape.n_future == 1
  if "n_future" not in wanted and not (resumes or refused):
    _check_heads(cfg.model.n_future, shape.n_future, path)
  settings = _settings(cfg.model, wanted)
  shape = dataclasses.replace(shape, **settings)
  cfg = dataclasses.replace(cfg, model=shape)
  if "data.tokenizer" not in given:
    cfg = cfg.replace(data={"tokenizer": found.data.tokenizer})
  elif not resumes:
    _check_tokenizer(cfg.data.tokenizer, codec, path)
  cfg = cfg.check()
  if resumes:
    _warn_of_another(path, target)
    return Start(cfg, None)
  changed = [
    f"model.{name} {value!r}"
    for name, value in settings.items()
    if name not in wanted and value != getattr(found.model, name)
  ]
  note = f"{', '.join(changed)} of the config file" if changed else ""
  return Start(cfg, functools.partial(_read, path, target, cfg, how, note))


def planned(
  cfg: config.Config, given: Collection[str], path: pathlib.Path
) -> config.Config:
  """`cfg` with the model in `path`, of as many heads as a flag asks for.

  Args:
    cfg: of --config, with its flags.
    given: fields that flags set.
    path: a folder that `mtp_jax.load` reads.

  Raises:
    ValueError: flags set another field of the model.
  """
  own = {n.removeprefix("model.") for n in given if n.startswith("model.")}
  options.refuse_idle(
    [f"config.model.{n}" for n in own - {"n_future", *surgery.SETTINGS}],
    "with --model, whose shape is planned; its n_future and "
    f"{', '.join(surgery.SETTINGS)} may be given",
  )
  shape = folders.settings(path)[0].model
  if "n_future" in own:
    shape = shape.with_heads(cfg.model.n_future)
  shape = dataclasses.replace(shape, **_settings(cfg.model, own))
  # What the config file says of its own model's heads.
  of_heads = {"head_weights": (), "head_stages": (), "head_change": "step"}
  of_heads |= {"detach": 0}
  kept = {n: v for n, v in of_heads.items() if f"train.{n}" not in given}
  return dataclasses.replace(cfg, model=shape).replace(
    train=kept, decode={"heads": 0}
  )


def _check_heads(asked: int, n: int, path: pathlib.Path) -> None:
  """Raises ValueError if a config file asks for `asked` heads, not `n`.

  A file that does not say has the default number. That may be a wish or not: it
  is a warning.
  """
  if asked == n:
    return
  line = (
    f"the config file has model.n_future={asked}, the model in {path} {n}: "
  )
  flag = "--config.model.n_future="
  if asked != config.Model.n_future:
    raise ValueError(f"{line}say how many to train, such as {flag}{asked}")
  if jax.process_index() == 0:
    logging.warning(
      "%sso many are trained; give %sN to change that", line, flag
    )


def _check_tokenizer(
  name: str, codec: tokenizer.Tokenizer, path: pathlib.Path
) -> None:
  """Raises ValueError if tokenizer `name` is not `codec`, that of a model."""
  given = tokenizer.load(name).fingerprint
  if given != codec.fingerprint:
    raise ValueError(
      f"--config.data.tokenizer={name} has fingerprint {given}, but the "
      f"tokenizer of --init={path} has {codec.fingerprint}: the model would "
      "read ids of another vocabulary; leave out --config.data.tokenizer"
    )


def _warn_of_another(path: pathlib.Path, target: pathlib.Path) -> None:
  """Logs a warning if the run in `target` did not begin with `path`."""
  with checkpoints.Checkpoints(target / "checkpoints") as saved:
    began = saved.metadata().get("init", {}).get("path")
  same = began and pathlib.Path(began).absolute() == path.absolute()
  if not same and jax.process_index() == 0:
    logging.warning(
      "--init=%s is not used: the run in %s goes on, which began with %s",
      *(path, target, began or "another model"),
    )


def _read(
  path: pathlib.Path,
  target: pathlib.Path,
  cfg: config.Config,
  how: str,
  note: str,
) -> tuple[model.Model, dict]:
  """The model of `path` as one of `cfg`, and where it came from."""
  net, _, _, step = folders.load_step(path, mesh=_host())
  origin = {
    "path": str(path),
    "step": step,
    "fingerprint": provenance.fingerprint(net),
  }
  before, n = net.cfg.n_future, cfg.model.n_future
  if cfg.model.head != net.cfg.head:
    net = surgery.linear_heads(net, n)
    origin["heads"] = f"heads 1 to {n} are new, linear, the identity"
  elif n < before:
    net = surgery.drop_heads(net, n)
    kept = "head 1" if n == 1 else f"heads 1 to {n}"
    origin["heads"] = f"{kept} of {before}"
  elif n > before:
    net = surgery.add_heads(net, n, jax.random.key(cfg.train.seed), how)
    new = (
      f"head {n} is" if n == before + 1 else f"heads {before + 1} to {n} are"
    )
    made = f"copied from head {before}" if how == "copy" else "initialised"
    origin["heads"] = f"{new} new, {made}"
  if count := net.cfg.layers - cfg.model.layers:
    net = surgery.drop_layers(net, count)
    lines = filter(None, [origin.get("heads")])
    origin["heads"] = "; ".join(
      [*lines, f"the last {count} layers of the trunk are left out"]
    )
  if cfg.model.vocab > net.cfg.vocab:
    net = vocabulary.pad(net, cfg.model.vocab)
  if note:
    origin["settings"] = note
  net = surgery.reconfigure(net, cfg.model)
  if jax.process_index() == 0:
    _copy_licences(path, target)
  return net, origin


def _copy_licences(path: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what a folder that is made of this run has to carry on."""
  try:
    for name, content in model_card.Source(path=path).files().items():
      (target / name).write_bytes(content)
  except OSError as error:
    raise checkpoints.CheckpointError(
      storage.not_writable(target, error)
    ) from error


def _host() -> jax.sharding.Mesh:
  """A mesh of one CPU: an accelerator is to hold the run's copy alone."""
  try:
    devices = jax.local_devices(backend="cpu")
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    devices = jax.local_devices()
  return sharding.make_mesh(config.Mesh(data=1, model=1), devices[:1])


def _settings(
  model_section: config.Model, wanted: Collection[str]
) -> dict[str, typing.Any]:
  """The `surgery.SETTINGS` that flags or the config file set."""
  default = config.Model()
  return {
    name: value
    for name in surgery.SETTINGS
    if (value := getattr(model_section, name)) != getattr(default, name)
    or name in wanted
  }


def _shape(
  found: config.Model, wanted: dict[str, typing.Any], folder: pathlib.Path
) -> config.Model:
  """The model section: of the model in `folder`, as far as flags allow."""
  n = wanted.get("n_future", found.n_future)
  if wanted.get("head") == "linear" != found.head:
    if found.n_future > 1 or not heads.KINDS[found.head].extends_trunk(1):
      raise ValueError(
        f"--config.model.head=linear, but the model in {folder} has "
        f"{found.n_future} {found.head} heads: linear heads are put on a model "
        "of one parallel head; drop the others first, in a run of its own with "
        "--config.model.n_future=1"
      )
    shape = dataclasses.replace(found, head="linear", n_future=n)
  else:
    shape = found.with_heads(n)
  fewer = min(wanted.get("layers", shape.layers), shape.layers)
  shape = dataclasses.replace(
    shape, vocab=wanted.get("vocab", shape.vocab), layers=fewer
  )
  for name, value in wanted.items():
    if name not in surgery.SETTINGS and value != getattr(shape, name):
      raise ValueError(
        f"--config.model.{name}={value}, but the model in {folder} has "
        f"{getattr(shape, name)}: leave it out. With --init, flags may set "
        f"model.n_future, model.{', model.'.join(('vocab', *surgery.SETTINGS))}"
        ", fewer model.layers, or model.head='linear' on a next-token model"
      )
  if shape.vocab < found.vocab:
    raise ValueError(
      f"--config.model.vocab={shape.vocab}, but the model in {folder} has "
      f"{found.vocab} ids: it can be padded to more, not cut"
    )
  return shape
