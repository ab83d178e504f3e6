"""Compares the metadata of a checkpoint with that of the run that resumes.

`workdir.metadata` is stored in every checkpoint: the config, and fingerprints
of tokenizer and corpus. Each config field declares whether it may change on
resuming (`sections.py`). Fingerprints must be equal.
"""

import dataclasses
import json
import pathlib

from mtp_jax import config
from mtp_jax.train import processes


def refusals(stored: dict, metadata: dict) -> list[str]:
  """One line for each value that differs but may not.

  Args:
    stored: metadata of the checkpoint.
    metadata: metadata of the run that resumes.
  """
  metadata = _without(metadata, "free", "local", "reported")
  # Fingerprints, which say nothing to a reader.
  codec, corpus = ({n: metadata.pop(n)} for n in ("tokenizer", "data"))
  lines = differences(stored, metadata, _defaults())
  began = (stored.get("init") or {}).get("path")
  if differences(stored, codec, {}):
    before = stored["config"].get("data", {}).get("tokenizer")
    lines.append(
      f"the tokenizer differs: the run's is {before!r}, give it by "
      "--config.data.tokenizer"
    )
  elif differences(stored, corpus, {}):
    lines.append(
      "the corpus differs: its files have changed, or others are read; restore "
      "them"
    )
  if began and any(line.startswith("config.model.") for line in lines):
    lines.append(
      f"the run began with --init={began}, which gave it its model: give it "
      "again, even if nothing is there any more"
    )
  return lines


def changes(stored: dict, metadata: dict) -> list[str]:
  """One line for each setting that changes the computation from now on."""
  lines = []
  for section, name in _declared("reported"):
    default = _defaults()["config"][section][name]
    old = stored["config"].get(section, {}).get(name, default)
    new = metadata["config"][section][name]
    if old != new:
      lines.append(
        f"{section}.{name} was {old!r} until here, and is {new!r} from here on"
      )
  return lines


def check_step(step: int, steps: int, workdir: pathlib.Path) -> None:
  """Raises ValueError if a run of `steps` steps is past its end already."""
  if step > steps:
    raise ValueError(
      f"{workdir} is at step {step} already, past train.steps {steps}: set "
      f"--config.train.steps={step} or more"
    )


def check_agreement(metadata: dict) -> None:
  """Raises ValueError if processes differ in settings, corpora or `init`."""
  texts = processes.gather(json.dumps(metadata))
  first, *others = map(json.loads, texts)
  for i, other in enumerate(others, 1):
    if lines := disagreements(first, other):
      raise ValueError(
        f"process 0 (the first) and process {i} (the second) do not do the "
        f"same run: {'; '.join(lines)}. Start all with the same settings, on "
        "the same files"
      )


def disagreements(first: dict, other: dict) -> list[str]:
  """One line for each value that differs between two processes of one run.

  Fingerprints of tokenizers and corpora, which say nothing, are not shown.
  """
  first, other = _shared(first), _shared(other)
  lines = []
  for name, what in (("tokenizer", "tokenizers"), ("data", "corpora")):
    pair = ({name: metadata.pop(name)} for metadata in (first, other))
    if differences(*pair):
      lines.append(f"their {what} differ")
  return lines + differences(first, other)


def differences(
  first: dict, second: dict, defaults: dict | None = None
) -> list[str]:
  """One line for each value of `second` that differs from `first`.

  A line reads 'config.model.width: 64 in the first, 96 in the second'.

  Args:
    first: nested dict of JSON values.
    second: nested dict of JSON values. Keys that only `first` has are ignored.
    defaults: values for keys that `first` lacks.
  """
  lines = []

  def compare(path, old, new, default):
    if isinstance(new, dict):
      old = old if isinstance(old, dict) else {}
      default = default if isinstance(default, dict) else {}
      for name in sorted(new):
        known = old.get(name, default.get(name))
        compare([*path, name], known, new[name], default.get(name))
    elif _plain(old) != _plain(new):
      name = ".".join(path if len(path) > 1 else ["metadata", *path])
      lines.append(
        f"{name}: {_plain(old)!r} in the first, {_plain(new)!r} in the second"
      )

  compare([], *json.loads(json.dumps([first, second, defaults])))
  return lines


def _plain(value):
  """`value`, a list of JSON as a tuple, as it is in a config."""
  return tuple(value) if isinstance(value, list) else value


def _defaults() -> dict:
  """Values of config fields that did not exist when a checkpoint was written.

  The run then behaved as it does with the defaults.
  """
  return {"config": dataclasses.asdict(config.Config())}


def _declared(*kinds: str) -> list[tuple[str, str]]:
  """(section, field) of the fields declared as one of `kinds`."""
  return [
    (section.name, field.name)
    for section in dataclasses.fields(config.Config)
    for field in dataclasses.fields(section.type)
    if field.metadata.get("on_resume") in kinds
  ]


def _shared(metadata: dict) -> dict:
  """What all processes must have in common; paths differ between hosts."""
  origin = {"fingerprint": None, "heads": None} | metadata.get("init", {})
  origin.pop("path", None)
  return _without(metadata, "local") | {"init": origin}


def _without(metadata: dict, *kinds: str) -> dict:
  """`metadata` without the config fields declared as one of `kinds`."""
  ignored = _declared(*kinds)
  compared = {
    section: {
      name: value
      for name, value in values.items()
      if (section, name) not in ignored
    }
    for section, values in metadata["config"].items()
  }
  return metadata | {"config": compared}
