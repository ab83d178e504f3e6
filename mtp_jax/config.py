"""Typed settings of a run: one section per part of the library.

The dataclasses below are the only place where defaults live. They can be
changed until `check` is called, because absl flags override single fields
(`--config.model.n_future=8`); after that they are values: compared, hashed
and stored in modules, never written to.
"""

import dataclasses
import difflib
import json
import pathlib
import typing
from collections.abc import Iterator

from mtp_jax import fields

HEAD_KINDS = ("parallel", "linear", "causal", "anticausal", "unembedding")
ATTENTION = ("auto", "xla", "cudnn", "splash")
OPTIMISERS = ("adamw", "muon")
LOSSES = ("serial", "checkpointed", "formula")
REMAT_POLICIES = ("none", "dots", "full")
SOURCES = ("python", "text", "jsonl", "array_record")

# Slots: a misspelt assignment, `config.model.widht = 64`, is an error.
_section = dataclasses.dataclass(unsafe_hash=True, slots=True)


@_section
class Model:
  """Shape of the network; letters as in README (D, F, L, H, K, V, N)."""

  vocab: int = 259  # V: the byte tokenizer's size
  width: int = 256  # D: residual width
  mlp: int = 768  # F: feed-forward width
  layers: int = 6  # L: transformer layers, the heads' own included
  extra_layers: int = 0  # trunk layers on top of L (paper, table S4: "+3")
  attn_heads: int = 4  # H: query heads
  kv_heads: int = 4  # K: key and value heads, a divisor of H
  n_future: int = 4  # N: future tokens predicted, the paper's n
  head: str = "parallel"  # one of HEAD_KINDS
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  mask_documents: bool = True  # no attention across documents
  dtype: str = "float32"  # activations; parameters stay float32
  remat: str = "none"  # one of REMAT_POLICIES
  attention: str = "auto"  # one of ATTENTION; auto: the platform's own

  @property
  def head_layers(self) -> int:
    """Transformer layers that the heads use up of `layers`."""
    chain = self.head in ("parallel", "causal", "anticausal")
    return self.n_future if chain else 0

  @property
  def trunk_layers(self) -> int:
    """Layers below the heads: the total, less the heads' own, plus extra."""
    return self.layers - self.head_layers + self.extra_layers

  def check(self) -> None:
    """Raises ValueError that names the field, its value and the remedy."""
    fields.check(self, zero=("extra_layers",))
    fields.one_of("model.head", self.head, HEAD_KINDS)
    fields.one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
    fields.one_of("model.remat", self.remat, REMAT_POLICIES)
    fields.one_of("model.attention", self.attention, ATTENTION)
    fields.divides(
      "model.width", self.width, "model.attn_heads", self.attn_heads
    )
    fields.divides(
      "model.attn_heads", self.attn_heads, "model.kv_heads", self.kv_heads
    )
    if self.width // self.attn_heads % 2:
      raise ValueError(
        f"model.width {self.width} over model.attn_heads {self.attn_heads} "
        "gives an odd number of channels; rotary embeddings need pairs"
      )
    if self.trunk_layers < 1:
      raise ValueError(
        f"model.layers {self.layers} leaves {self.trunk_layers} trunk layers "
        f"under {self.n_future} {self.head} heads: raise model.layers, lower "
        "model.n_future, or use model.head='unembedding'"
      )


@_section
class Data:
  """Where documents come from and how they become batches."""

  source: str = "python"  # one of SOURCES
  path: str = ""  # file or directory; empty only for source='python'
  field: str = "text"  # JSONL field that holds the document
  tokenizer: str = "bytes"  # 'bytes' or the path of a SentencePiece model
  cache: str = "~/.cache/mtp_jax"  # packed tokens, keyed by fingerprints
  seq_len: int = 256  # T
  batch: int = 16  # B, over all processes
  max_bytes: int = 0  # stop reading the corpus there; 0: read it all
  held_out: float = 0.02  # share of documents kept for evaluation
  on_error: str = "raise"  # 'raise', or 'skip': count and report bad records
  seed: int = 0
  workers: int = 0  # prefetching worker processes

  def check(self) -> None:
    """Raises ValueError that names the field, its value and the remedy."""
    fields.check(
      self,
      zero=("max_bytes", "workers", "seed"),
      most={"max_bytes": fields.INT64, "seed": fields.INT64},
    )
    fields.one_of("data.source", self.source, SOURCES)
    fields.one_of("data.on_error", self.on_error, ("raise", "skip"))
    if self.source != "python" and not self.path:
      raise ValueError(f"data.source {self.source!r} needs data.path")
    for name in ("tokenizer", "cache"):
      if not getattr(self, name):
        raise ValueError(f"data.{name} is empty; leave it out for its default")
    for name in ("path", "tokenizer", "cache"):
      try:
        pathlib.Path(getattr(self, name)).expanduser()
      except RuntimeError as error:  # ~nobody
        value = getattr(self, name)
        raise ValueError(f"data.{name} is {value!r}: {error}") from error
    fields.share(self, "held_out", 0 < self.held_out < 1)


@_section
class Optim:
  """AdamW with linear warm-up and cosine decay (paper, table S13), or Muon."""

  kind: str = "adamw"  # one of OPTIMISERS
  peak: float = 3e-4  # learning rate after warm-up
  # Under Muon: the learning rate of what Adam updates (embedding, unembedding,
  # norms) over that of the matrices.
  adam_ratio: float = 1.0
  warmup: int = 100  # steps
  end: float = 0.03  # last learning rate over peak, the paper's decay ratio
  beta1: float = 0.9
  beta2: float = 0.95
  decay: float = 0.1  # decoupled weight decay, on matrices only
  clip: float = 1.0  # global gradient norm

  def check(self) -> None:
    """Raises ValueError that names the field, its value and the remedy."""
    fields.check(self, zero=("warmup", "end", "beta1", "beta2", "decay"))
    fields.one_of("optim.kind", self.kind, OPTIMISERS)
    if self.kind == "adamw" and self.adam_ratio != 1:
      raise ValueError(
        f"optim.adam_ratio is {self.adam_ratio}, but optim.kind is 'adamw', "
        "which has one learning rate; set optim.peak, or optim.kind to 'muon'"
      )
    fields.share(self, "end", 0 <= self.end <= 1)
    for name in ("beta1", "beta2"):
      fields.share(self, name, 0 <= getattr(self, name) < 1)


@_section
class Mesh:
  """Devices along each axis; -1 takes all that are left."""

  data: int = -1  # batch, and parameters sharded over it (FSDP)
  model: int = 1  # tensor parallel

  def check(self) -> None:
    """Raises ValueError that names the field, its value and the remedy."""
    fields.check(self, any_sign=("data", "model"))
    if (self.data, self.model).count(-1) > 1:
      raise ValueError("only one of mesh.data and mesh.model may be -1")
    for name in ("data", "model"):
      size = getattr(self, name)
      if size < 1 and size != -1:
        raise ValueError(f"mesh.{name} is {size}; it must be positive, or -1")


@_section
class Train:
  """The training loop."""

  steps: int = 1000
  accumulate: int = 1  # microbatches per step
  loss: str = "serial"  # one of LOSSES
  loss_block: int = 256  # positions whose logits are alive at once
  head_weights: tuple[float, ...] = ()  # one per head; empty: all 1
  seed: int = 0
  log_every: int = 20
  eval_every: int = 500
  eval_batches: int = 8
  sample_tokens: int = 64  # length of the sample written at evaluation; 0: none
  save_every: int = 500
  keep: int = 3  # checkpoints kept
  max_bad_steps: int = 10  # non-finite steps in a row before stopping

  def check(self) -> None:
    """Raises ValueError that names the field, its value and the remedy."""
    fields.check(
      self,
      zero=("sample_tokens", "seed"),
      most={"seed": 2**32 - 1},  # jax.random.key drops higher bits
    )
    fields.one_of("train.loss", self.loss, LOSSES)
    if any(weight < 0 for weight in self.head_weights):
      raise ValueError(
        f"train.head_weights is {self.head_weights}; no weight may be negative"
      )
    if self.head_weights and not any(self.head_weights):
      raise ValueError(
        f"train.head_weights is {self.head_weights}; with every weight 0 "
        "nothing is learned: give at least one a positive weight"
      )


@_section
class Decode:
  """Generation."""

  heads: int = 0  # k: heads used, 1 is ordinary decoding; 0: all
  max_new: int = 256  # tokens

  def check(self) -> None:
    """Raises ValueError that names the field, its value and the remedy."""
    fields.check(self, zero=("heads",))


@_section
class Config:
  """A whole run. Only `train`, `run`, `workdir` and the programs read this;
  the rest of the library takes the section or the numbers that it needs."""

  model: Model = dataclasses.field(default_factory=Model)
  data: Data = dataclasses.field(default_factory=Data)
  optim: Optim = dataclasses.field(default_factory=Optim)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  train: Train = dataclasses.field(default_factory=Train)
  decode: Decode = dataclasses.field(default_factory=Decode)

  def sections(self) -> dict[str, typing.Any]:
    """The sections by name; ValueError where one is of another class."""
    found = {}
    for name, kind in typing.get_type_hints(Config).items():
      found[name] = getattr(self, name)
      if type(found[name]) is not kind:
        raise ValueError(
          f"config.{name} is {fields.kind_of(type(found[name]))}; it takes a "
          f"config.{kind.__name__}"
        )
    return found

  def check(self) -> "Config":
    """Returns self, or raises ValueError that names fields and numbers."""
    for section in self.sections().values():
      section.check()
    fields.divides(
      "data.batch", self.data.batch, "train.accumulate", self.train.accumulate
    )
    weights, n = self.train.head_weights, self.model.n_future
    if weights and len(weights) != n:
      raise ValueError(
        f"train.head_weights has {len(weights)} entries for model.n_future={n}"
      )
    if self.decode.heads > n:
      raise ValueError(
        f"decode.heads={self.decode.heads} but model.n_future={n}"
      )
    if self.optim.warmup >= self.train.steps:
      raise ValueError(
        f"optim.warmup {self.optim.warmup} is not below train.steps "
        f"{self.train.steps}"
      )
    return self


def to_json(config: Config) -> str:
  """The config as indented JSON, one key per field."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
  """Rebuilds a Config from `to_json`.

  Raises:
    ValueError: no JSON, a key twice, or what `from_dict` refuses.
  """
  try:
    tree = json.loads(text, object_pairs_hook=_unique_keys)
  except json.JSONDecodeError as error:
    raise ValueError(f"the config is not JSON: {error}") from error
  except RecursionError as error:
    raise ValueError("the config is not JSON: nested too deeply") from error
  return from_dict(tree)


def from_dict(tree: dict) -> Config:
  """Rebuilds a Config from `dataclasses.asdict`; what is missing keeps its
  default.

  Raises:
    ValueError: `tree` has another shape, a field does not exist, or
      `Config.check` refuses a value.
  """
  config = Config()
  if not isinstance(tree, dict):
    raise ValueError(
      f"the config is {fields.kind_of(type(tree))}; it takes an object of "
      'sections, such as {"model": {"width": 256}}'
    )
  for section, values in tree.items():
    if section not in _fields(config):
      raise ValueError(unknown_field(config, str(section)))
    if not isinstance(values, dict):
      raise ValueError(
        f"config.{section} is {values!r:.60}, {fields.kind_of(type(values))}; "
        "it takes an object of fields"
      )
    for name, value in values.items():
      if name not in _fields(getattr(config, section)):
        raise ValueError(unknown_field(config, f"{section}.{name}"))
      if isinstance(value, list):
        value = tuple(value)
      setattr(getattr(config, section), name, value)
  return config.check()


def _unique_keys(pairs: list[tuple[str, typing.Any]]) -> dict:
  tree = dict(pairs)
  if len(tree) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the config has the key {twice!r} twice; keep one")
  return tree


def load(path: str | pathlib.Path) -> Config:
  """Reads the config that a run wrote to its workdir.

  Raises:
    ValueError: names the file: it is missing, not UTF-8, or what `from_json`
      refuses.
  """
  try:
    return from_json(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}") from error
  except ValueError as error:  # UnicodeDecodeError is one
    raise ValueError(f"{path}: {error}") from error


def differences(old: dict, new: dict) -> list[str]:
  """Fields in which two `dataclasses.asdict` trees differ, as
  'model.width: 64 in the first, 96 in the second'."""
  lines = []
  for section in sorted(old.keys() | new.keys()):
    a, b = old.get(section, {}), new.get(section, {})
    for name in sorted(a.keys() | b.keys()):
      x, y = (
        tuple(v) if isinstance(v, list) else v
        for v in (a.get(name), b.get(name))
      )
      if x != y:
        lines.append(
          f"{section}.{name}: {x!r} in the first, {y!r} in the second"
        )
  return lines


def paths(config: Config) -> Iterator[str]:
  """Every field, as 'model.width'."""
  for name, section in config.sections().items():
    for field in _fields(section):
      yield f"{name}.{field}"


def unknown_field(config: Config, path: str) -> str:
  """Message for a field that does not exist, with the nearest names."""
  known = list(paths(config))
  near = difflib.get_close_matches(path, _fields(config) + known, 3, 0.5)
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  return f"config has no field {path!r}{hint}"


def _fields(section) -> list[str]:
  return [f.name for f in dataclasses.fields(section)]
