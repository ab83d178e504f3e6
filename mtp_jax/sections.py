"""The sections of a `Config`, each with its defaults and its checks.

Defaults live here and nowhere else. A section is frozen: it can be compared,
hashed and stored in a module. `fields.free`, `fields.local` and
`fields.reported` declare the fields that may change when a run resumes.
"""

import dataclasses
import typing

from mtp_jax import fields, section_checks

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
ROPE_SCALING = ("none", "linear", "dynamic", "llama3", "yarn")
OPTIMISERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear")  # from the peak of the rate to its end
HEAD_CHANGES = ("step", "linear")
LOSSES = ("serial", "checkpointed", "formula")
FREEZE = ("none", "trunk")
REMAT_POLICIES = ("none", "dots", "full")
SOURCES = ("python", "text", "jsonl", "array_record")
LOSS_ON = ("all", "answer")

_section = dataclasses.dataclass(frozen=True)
# Numbers of `Model` that may be 0.
_MODEL_ZERO = ("extra_layers", "attn_channels", "sliding_window", "rope_length")
_MODEL_ZERO += ("rope_attention",)


@_section
class Model:
  """The shape of the network. README lists the letters in the comments."""

  vocab: int = 259  # V: the byte tokenizer's size
  width: int = 256  # D: residual width
  mlp: int = 768  # F: feed-forward width
  layers: int = 6  # L: transformer layers, those of the heads included
  extra_layers: int = 0  # more trunk layers (paper, table S4: "+3")
  attn_heads: int = 4  # H: query heads
  kv_heads: int = 4  # K: key and value heads, a divisor of H
  attn_channels: int = 0  # C: channels per attention head; 0: D / H
  qkv_bias: bool = False  # biases of queries, keys and values
  qk_norm: bool = False  # RMSNorm over C of queries and keys, then rotation
  sliding_window: int = 0  # tokens attended to, the own included; 0: all
  n_future: int = 4  # N: future tokens predicted, the paper's n
  head: str = "parallel"  # one of HEAD_KINDS
  # How many tokens ahead each head predicts, head 1 the next one; empty: 1 to
  # N. Leaps such as (1, 3, 5, 7): see `drafting`.
  offsets: tuple[int, ...] = ()
  rope_theta: float = 10_000.0
  rope_scaling: str = "none"  # one of ROPE_SCALING; see `model.rotary`
  rope_factor: float = 1.0  # how much longer scaling makes the context
  rope_length: int = 0  # tokens of the context before; 0: not known
  # In config.json of Hugging Face: low_freq_factor and high_freq_factor of
  # llama3, beta_slow and beta_fast of yarn; attention_factor.
  rope_slow: float = 1.0  # channels of fewer turns per rope_length scale fully
  rope_fast: float = 4.0  # those of more turns are not scaled
  rope_attention: float = 0.0  # yarn: factor of cos and sin; 0: by rope_factor
  norm_eps: float = 1e-5
  mask_documents: bool = True  # no attention across documents
  dtype: str = "float32"  # activations; parameters stay float32
  remat: str = "none"  # one of REMAT_POLICIES
  attention: str = fields.free("auto")  # one of ATTENTION; auto: by platform

  @property
  def head_layers(self) -> int:
    """How many of `layers` belong to the heads."""
    return self.n_future * HEAD_KINDS[self.head]

  @property
  def channels(self) -> int:
    """C: channels per attention head."""
    return self.attn_channels or self.width // self.attn_heads

  @property
  def trunk_layers(self) -> int:
    """Layers of the trunk: `layers` - `head_layers` + `extra_layers`."""
    return self.layers - self.head_layers + self.extra_layers

  @property
  def distances(self) -> tuple[int, ...]:
    """How many tokens ahead heads 1 to N predict."""
    return self.offsets or tuple(range(1, self.n_future + 1))

  @property
  def reach(self) -> int:
    """Tokens after a window that the furthest head's targets need."""
    return self.distances[-1]

  @property
  def drafting(self) -> int:
    """Heads that can draft: those before the first gap of `offsets`.

    Heads 1 to k draft the next k tokens, of which none may be missing. Of
    heads with offsets (1, 2, 5) two can, of (1, 3, 5, 7) one.
    """
    return sum(d == i for i, d in enumerate(self.distances, 1))

  def with_heads(self, n_future: int) -> typing.Self:
    """The same trunk under another number of heads."""
    more = n_future - self.n_future
    return dataclasses.replace(
      self,
      n_future=n_future,
      layers=self.layers + more * HEAD_KINDS[self.head],
      offsets=self.offsets[:n_future],
    )

  def check(self) -> typing.Self:
    """See `Config.check`."""
    checked = fields.check(self, zero=_MODEL_ZERO)
    fields.one_of("model.head", self.head, HEAD_KINDS)
    fields.one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
    fields.one_of("model.remat", self.remat, REMAT_POLICIES)
    fields.one_of("model.attention", self.attention, ATTENTION)
    if not self.attn_channels:
      fields.divides(
        "model.width", self.width, "model.attn_heads", self.attn_heads
      )
    fields.divides(
      "model.attn_heads", self.attn_heads, "model.kv_heads", self.kv_heads
    )
    if self.channels % 2:
      given = f"model.attn_channels {self.attn_channels}"
      if not self.attn_channels:
        given = f"model.width {self.width} over "
        given += f"model.attn_heads {self.attn_heads}"
      raise ValueError(
        f"{given} gives an odd number of channels; rotary embeddings need pairs"
      )
    section_checks.rope(self, ROPE_SCALING)
    section_checks.offsets(self.offsets, self.n_future)
    if self.offsets and self.drafting == self.n_future:  # as if not given
      checked = dataclasses.replace(checked, offsets=())
    if self.trunk_layers < 1:
      raise ValueError(
        f"model.layers {self.layers} leaves {self.trunk_layers} trunk layers "
        f"under {self.n_future} {self.head} heads: raise model.layers, lower "
        "model.n_future, or use model.head='unembedding'"
      )
    return checked


@_section
class Data:
  """The corpus, and how it is packed and batched."""

  source: str = "python"  # one of SOURCES
  path: str = fields.local("")  # file or folder; may be empty for 'python'
  field: str = "text"  # JSONL field that holds the document
  # JSONL field that stands before `field`, which is then the answer; '': none.
  prompt: str = ""
  loss_on: str = "all"  # one of LOSS_ON; 'answer': prompts are read, not learnt
  tokenizer: str = fields.local("bytes")  # or a path: see tokenizer.load
  cache: str = fields.local("~/.cache/mtp_jax")  # folder of packed corpora
  seq_len: int = 256  # T
  batch: int = 16  # B, over all processes
  max_bytes: int = 0  # bytes of the corpus to read; 0: all
  held_out: float = 0.02  # share of documents for evaluation only
  # At a bad record; 'skip' leaves it out.
  on_error: str = fields.free("raise")
  seed: int = 0
  workers: int = fields.local(0)  # processes that prefetch; 0: threads do

  def check(self) -> typing.Self:
    """See `Config.check`."""
    checked = fields.check(
      self,
      zero=("max_bytes", "workers", "seed"),
      most={"max_bytes": fields.INT64, "seed": fields.INT64},
    )
    fields.one_of("data.source", self.source, SOURCES)
    fields.one_of("data.on_error", self.on_error, ("raise", "skip"))
    fields.one_of("data.loss_on", self.loss_on, LOSS_ON)
    if self.source != "python" and not self.path:
      raise ValueError(f"data.source {self.source!r} needs data.path")
    section_checks.prompt(self)
    section_checks.paths(self)
    fields.share(self, "held_out", 0 < self.held_out < 1)
    return checked


@_section
class Optim:
  """AdamW with linear warm-up and cosine decay (paper, table S13), or Muon."""

  kind: str = "adamw"  # one of OPTIMISERS
  peak: float = fields.reported(3e-4)  # learning rate after warm-up
  # Under Muon, Adam updates the embedding, the unembedding and the norms. Its
  # learning rate is this multiple of the rate for the matrices.
  adam_ratio: float = fields.reported(1.0)
  warmup: int = fields.reported(100)  # steps
  schedule: str = fields.reported("cosine")  # one of SCHEDULES
  end: float = fields.reported(0.03)  # final learning rate / peak
  beta1: float = 0.9
  beta2: float = 0.95
  decay: float = 0.1  # decoupled weight decay, on matrices only
  clip: float = 1.0  # global gradient norm
  newton_schulz: int = 5  # iterations that orthogonalise an update of Muon

  def check(self) -> typing.Self:
    """See `Config.check`."""
    checked = fields.check(
      self, zero=("warmup", "end", "beta1", "beta2", "decay")
    )
    fields.one_of("optim.kind", self.kind, OPTIMISERS)
    if self.kind == "adamw" and self.adam_ratio != 1:
      raise ValueError(
        f"optim.adam_ratio is {self.adam_ratio}, but optim.kind is 'adamw', "
        "which has one learning rate; set optim.peak, or optim.kind to 'muon'"
      )
    if self.kind == "adamw" and self.newton_schulz != Optim.newton_schulz:
      raise ValueError(
        f"optim.newton_schulz is {self.newton_schulz}, but optim.kind is "
        "'adamw', which has no such iterations; set optim.kind to 'muon'"
      )
    fields.one_of("optim.schedule", self.schedule, SCHEDULES)
    fields.share(self, "end", 0 <= self.end <= 1)
    for name in ("beta1", "beta2"):
      fields.share(self, name, 0 <= getattr(self, name) < 1)
    return checked


@_section
class Mesh:
  """Devices along each axis; -1 means all remaining devices."""

  data: int = fields.free(-1)  # batch, and parameters sharded over it (FSDP)
  model: int = fields.free(1)  # tensor parallelism

  def check(self) -> typing.Self:
    """See `Config.check`."""
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

  steps: int = fields.reported(1000)
  accumulate: int = 1  # microbatches per step
  loss: str = "serial"  # one of LOSSES
  loss_block: int = fields.free(256)  # positions whose logits exist at once
  # One per head; empty: all 1. With `head_stages`, one per head for each stage,
  # the first stage's first. See `train.head_weights`.
  head_weights: tuple[float, ...] = ()
  # Where the second, third, ... stage begins, as a share of `steps`.
  head_stages: tuple[float, ...] = ()
  # One of HEAD_CHANGES. 'linear': weights move evenly towards the next stage's,
  # which they have where it begins.
  head_change: str = "step"
  # Heads from this one on send no gradient into the trunk; 0: all do.
  detach: int = 0
  # One of FREEZE. 'trunk': only heads 2..N are trained, so that every text of
  # head 1 stays the same.
  freeze: str = "none"
  # The run starts from a model (--init, `init` of `fit`): it is refused where
  # it would begin at random.
  finetune: bool = fields.free(False)
  seed: int = 0
  log_every: int = fields.free(20)
  eval_every: int = fields.free(500)
  eval_batches: int = fields.free(8)
  sample_tokens: int = fields.free(64)  # length of a sample; 0: no samples
  save_every: int = fields.free(500)
  keep: int = fields.free(3)  # newest checkpoints kept
  # Non-finite steps in a row before the run stops.
  max_bad_steps: int = fields.reported(10)

  def check(self) -> typing.Self:
    """See `Config.check`."""
    checked = fields.check(
      self,
      zero=("sample_tokens", "seed", "detach"),
      most={"seed": 2**32 - 1},  # jax.random.key drops higher bits
    )
    fields.one_of("train.loss", self.loss, LOSSES)
    fields.one_of("train.freeze", self.freeze, FREEZE)
    fields.one_of("train.head_change", self.head_change, HEAD_CHANGES)
    section_checks.weights(
      self.head_weights, self.head_stages, self.head_change
    )
    section_checks.detach(self.detach, self.freeze)
    return checked


@_section
class Decode:
  """Text generation."""

  heads: int = fields.free(0)  # k: heads used; 1: ordinary decoding; 0: all
  max_new: int = fields.free(256)  # tokens

  def check(self) -> typing.Self:
    """See `Config.check`."""
    return fields.check(self, zero=("heads",))
