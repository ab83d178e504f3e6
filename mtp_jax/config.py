"""Typed settings of a run: one section per part of the library.

The dataclasses below are the only place where defaults live. They are values:
compared, hashed and stored in modules. `Config.replace` returns a copy with
other values, and `check` one with every number of its field's type.
"""

import dataclasses
import difflib
import json
import pathlib
import typing
from collections.abc import Iterator

from mtp_jax import fields

# Of config.json and of checkpoints; those without a number have format 1. A
# change that this version's readers would misread takes the next number.
FORMAT = 1

# Kind of head -> transformer layers of one head, which count among `layers`.
# What else distinguishes the kinds is in `model.heads.kinds`.
HEAD_KINDS = {
  "parallel": 1,
  "linear": 0,
  "causal": 1,
  "anticausal": 1,
  "unembedding": 0,
}
ATTENTION = ("auto", "xla", "cudnn", "splash")
OPTIMISERS = ("adamw", "muon")
LOSSES = ("serial", "checkpointed", "formula")
REMAT_POLICIES = ("none", "dots", "full")
SOURCES = ("python", "text", "jsonl", "array_record")

_section = dataclasses.dataclass(frozen=True)


# A run that resumes has the settings of its checkpoint. A field that may differ
# is declared with one of these three; `resume` compares accordingly.
def _free(default):
  """A field that changes no result by more than rounding."""
  return dataclasses.field(default=default, metadata={"on_resume": "free"})


def _local(default):
  """A place on the host: free, and each process may have its own."""
  return dataclasses.field(default=default, metadata={"on_resume": "local"})


def _rate(default):
  """A field that changes what is computed from there on; the run says so."""
  return dataclasses.field(default=default, metadata={"on_resume": "rate"})


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
  attention: str = _free("auto")  # one of ATTENTION; auto: the platform's own

  @property
  def head_layers(self) -> int:
    """Transformer layers that the heads use up of `layers`."""
    return self.n_future * HEAD_KINDS[self.head]

  @property
  def trunk_layers(self) -> int:
    """Layers below the heads: the total, less the heads' own, plus extra."""
    return self.layers - self.head_layers + self.extra_layers

  def check(self) -> typing.Self:
    """A copy whose numbers have their fields' types; ValueError names the
    field, its value and the remedy."""
    checked = fields.check(self, zero=("extra_layers",))
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
    return checked


@_section
class Data:
  """Where documents come from and how they become batches."""

  source: str = "python"  # one of SOURCES
  path: str = _local("")  # file or directory; empty only for source='python'
  field: str = "text"  # JSONL field that holds the document
  tokenizer: str = _local("bytes")  # or the path of a SentencePiece model
  cache: str = _local("~/.cache/mtp_jax")  # packed tokens by fingerprints
  seq_len: int = 256  # T
  batch: int = 16  # B, over all processes
  max_bytes: int = 0  # stop reading the corpus there; 0: read it all
  held_out: float = 0.02  # share of documents kept for evaluation
  on_error: str = "raise"  # 'raise', or 'skip': count and report bad records
  seed: int = 0
  workers: int = _local(0)  # prefetching worker processes

  def check(self) -> typing.Self:
    """A copy whose numbers have their fields' types; ValueError names the
    field, its value and the remedy."""
    checked = fields.check(
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
    return checked


@_section
class Optim:
  """AdamW with linear warm-up and cosine decay (paper, table S13), or Muon."""

  kind: str = "adamw"  # one of OPTIMISERS
  peak: float = _rate(3e-4)  # learning rate after warm-up
  # Under Muon: the learning rate of what Adam updates (embedding, unembedding,
  # norms) over that of the matrices.
  adam_ratio: float = _rate(1.0)
  warmup: int = _rate(100)  # steps
  end: float = _rate(0.03)  # last learning rate over peak: "decay ratio"
  beta1: float = 0.9
  beta2: float = 0.95
  decay: float = 0.1  # decoupled weight decay, on matrices only
  clip: float = 1.0  # global gradient norm

  def check(self) -> typing.Self:
    """A copy whose numbers have their fields' types; ValueError names the
    field, its value and the remedy."""
    checked = fields.check(
      self, zero=("warmup", "end", "beta1", "beta2", "decay")
    )
    fields.one_of("optim.kind", self.kind, OPTIMISERS)
    if self.kind == "adamw" and self.adam_ratio != 1:
      raise ValueError(
        f"optim.adam_ratio is {self.adam_ratio}, but optim.kind is 'adamw', "
        "which has one learning rate; set optim.peak, or optim.kind to 'muon'"
      )
    fields.share(self, "end", 0 <= self.end <= 1)
    for name in ("beta1", "beta2"):
      fields.share(self, name, 0 <= getattr(self, name) < 1)
    return checked


@_section
class Mesh:
  """Devices along each axis; -1 takes all that are left."""

  data: int = _free(-1)  # batch, and parameters sharded over it (FSDP)
  model: int = _free(1)  # tensor parallel

  def check(self) -> typing.Self:
    """A copy whose numbers have their fields' types; ValueError names the
    field, its value and the remedy."""
    checked = fields.check(self, any_sign=("data", "model"))
    if (self.data, self.model).count(-1) > 1:
      raise ValueError("only one of mesh.data and mesh.model may be -1")
    for name in ("data", "model"):
      size = getattr(self, name)
      if size < 1 and size != -1:
        raise ValueError(f"mesh.{name} is {size}; it must be positive, or -1")
    return checked


@_section
class Train:
  """The training loop."""

  steps: int = _rate(1000)
  accumulate: int = 1  # microbatches per step
  loss: str = "serial"  # one of LOSSES
  loss_block: int = _free(256)  # positions whose logits are alive at once
  head_weights: tuple[float, ...] = ()  # one per head; empty: all 1
  seed: int = 0
  log_every: int = _free(20)
  eval_every: int = _free(500)
  eval_batches: int = _free(8)
  sample_tokens: int = _free(64)  # written at each evaluation; 0: no sample
  save_every: int = _free(500)
  keep: int = _free(3)  # checkpoints kept
  max_bad_steps: int = _rate(10)  # non-finite steps in a row before stopping

  def check(self) -> typing.Self:
    """A copy whose numbers have their fields' types; ValueError names the
    field, its value and the remedy."""
    checked = fields.check(
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
    return checked


@_section
class Decode:
  """Generation."""

  heads: int = _free(0)  # k: heads used, 1 is ordinary decoding; 0: all
  max_new: int = _free(256)  # tokens

  def check(self) -> typing.Self:
    """A copy whose numbers have their fields' types; ValueError names the
    field, its value and the remedy."""
    checked = fields.check(self, zero=("heads",))
    return checked


@_section
class Config:
  """The settings of a run, one section per part of the library.

  Only `train` and the programs read a whole Config. Every other function
  takes the section or the numbers that it needs.

  Example:
    >>> import mtp_jax
    >>> cfg = mtp_jax.Config().replace(model={"width": 64, "layers": 5})
    >>> cfg.model.trunk_layers
    1
    >>> cfg.replace(model={"attn_heads": 5}).check()
    Traceback (most recent call last):
    ValueError: model.width 64 is not divisible by model.attn_heads 5
  """

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
    """A copy of checked sections; ValueError names fields and numbers."""
    checked = Config(**{k: s.check() for k, s in self.sections().items()})
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
        f"{self.train.steps}; set --config.optim.warmup below that"
      )
    return checked

  def replace(self, /, **changes: dict[str, typing.Any]) -> "Config":
    """A copy with other values in some fields, not checked.

    `cfg.replace(model={"width": 64, "layers": 4}, train={"steps": 9})`

    Raises:
      ValueError: a section or field does not exist, or its value is no dict.
    """
    sections = self.sections()
    for section, values in changes.items():
      if section not in sections:
        raise ValueError(unknown_field(self, section))
      if not isinstance(values, dict):
        raise ValueError(
          f"config.{section} is {values!r:.60}, "
          f"{fields.kind_of(type(values))}; it takes an object of fields"
        )
      for name in values:
        if name not in _fields(sections[section]):
          raise ValueError(unknown_field(self, f"{section}.{name}"))
      sections[section] = dataclasses.replace(sections[section], **values)
    return Config(**sections)


def to_json(config: Config) -> str:
  """The config as indented JSON: the format, then one key per field."""
  tree = {"format": FORMAT} | dataclasses.asdict(config)
  return json.dumps(tree, indent=2) + "\n"


def from_json(text: str) -> Config:
  """Rebuilds a Config from `to_json`.

  Raises:
    ValueError: no JSON, a key twice, an unknown format, or what `from_dict`
      refuses.
  """
  try:
    tree = json.loads(text, object_pairs_hook=_unique_keys)
  except json.JSONDecodeError as error:
    raise ValueError(f"the config is not JSON: {error}") from error
  except RecursionError as error:
    raise ValueError("the config is not JSON: nested too deeply") from error
  if isinstance(tree, dict):
    check_format("the config", tree.pop("format", 1))
  return from_dict(tree)


def check_format(what: str, number) -> None:
  """ValueError unless this version reads `what`, of format `number`."""
  if type(number) is not int or not 1 <= number <= FORMAT:
    raise ValueError(
      f"{what} has format {number!r:.60}, and this version of mtp_jax reads "
      f"formats up to {FORMAT}: install the version that wrote it"
    )


def from_dict(tree: dict) -> Config:
  """Rebuilds a Config from `dataclasses.asdict`; what is missing keeps its
  default.

  Raises:
    ValueError: `tree` has another shape, a field does not exist, or
      `Config.check` refuses a value.
  """
  if not isinstance(tree, dict):
    raise ValueError(
      f"the config is {fields.kind_of(type(tree))}; it takes an object of "
      'sections, such as {"model": {"width": 256}}'
    )
  sections = {name: _tuples(values) for name, values in tree.items()}
  return Config().replace(**sections).check()


def _tuples(values):
  """A section's values, with a tuple for every list of JSON."""
  if not isinstance(values, dict):
    return values  # `replace` refuses it
  return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


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
