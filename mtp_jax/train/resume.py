"""What may differ where a run resumes, and what differs.

A checkpoint keeps the metadata of its run (`workdir.metadata`); the run that
goes on has metadata of its own. Each field of `config` declares whether it may
differ; all else in the metadata may not.
"""

import dataclasses
import json

from mtp_jax import config


def refusals(stored: dict, metadata: dict) -> list[str]:
  """What differs and may not, a line each.

  Args:
    stored: metadata of the checkpoint, from JSON.
    metadata: of the run that goes on.
  """
  lines = differences(
    stored, _without(metadata, "free", "local", "reported"), _defaults()
  )
  if any(line.startswith("data.") for line in lines):
    lines.append(
      "the text differs: the corpus's files have changed, or others are read; "
      "restore them"
    )
  return lines


def changes(stored: dict, metadata: dict) -> list[str]:
  """What is computed otherwise than before the checkpoint, a line each."""
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


def disagreements(first: dict, other: dict) -> list[str]:
  """What differs between two processes of one run and may not."""
  return differences(first, _without(other, "local"))


def differences(
  first: dict, second: dict, defaults: dict | None = None
) -> list[str]:
  """Values of `second` that `first` has otherwise, as
  'config.model.width: 64 in the first, 96 in the second'.

  Args:
    first: JSON values.
    second: JSON values; keys that only `first` has are not compared.
    defaults: values of keys that `first` lacks.
  """
  lines = []

  def compare(path, old, new, default):
    if isinstance(new, dict):
      old = old if isinstance(old, dict) else {}
      default = default if isinstance(default, dict) else {}
      for name in sorted(new):
        kept = old.get(name, default.get(name))
        compare([*path, name], kept, new[name], default.get(name))
    elif _plain(old) != _plain(new):
      name = ".".join(path if len(path) > 1 else ["metadata", *path])
      lines.append(
        f"{name}: {_plain(old)!r} in the first, {_plain(new)!r} in the second"
      )

  compare([], *json.loads(json.dumps([first, second, defaults])))
  return lines


def _plain(value):
  """A list of JSON as the tuple that a config has there."""
  return tuple(value) if isinstance(value, list) else value


def _defaults() -> dict:
  """Metadata of a checkpoint that was written before a config field existed.

  Such a field then had the effect of its default value.
  """
  return {"config": dataclasses.asdict(config.Config())}


def _declared(*kinds: str) -> list[tuple[str, str]]:
  """(section, field) of the fields that declare one of `kinds` on resuming."""
  return [
    (section.name, field.name)
    for section in dataclasses.fields(config.Config)
    for field in dataclasses.fields(section.type)
    if field.metadata.get("on_resume") in kinds
  ]


def _without(metadata: dict, *kinds: str) -> dict:
  """`metadata` without the fields that declare one of `kinds`."""
  left_out = _declared(*kinds)
  kept = {
    section: {
      name: value
      for name, value in values.items()
      if (section, name) not in left_out
    }
    for section, values in metadata["config"].items()
  }
  return metadata | {"config": kept}
