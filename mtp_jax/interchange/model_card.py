"""The model card: what a folder holds, and where its weights come from."""

import dataclasses
import pathlib
import re
from typing import Any

from mtp_jax import config, tokenizer
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.interchange import extra_heads, folders

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
PREVIOUS = "README.original.md"  # the card of the model that this one is from
_USE = """## Use

With mtp_jax, all heads:

```python
import mtp_jax

net, cfg, codec = mtp_jax.load("PATH OF THIS FOLDER")
```

As an ordinary next-token model, head 1 alone:

```python
import transformers

net = transformers.AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
```
"""


@dataclasses.dataclass(frozen=True)
class Source:
  """The folder that a model comes from, and what is known of it.

  Attributes:
    kind: 'none', or one of `folders.kind`.
    step: of a run's checkpoint.
    record: the metadata of that checkpoint.
  """

  kind: str = "none"
  path: pathlib.Path | None = None
  cfg: config.Config | None = None
  codec: tokenizer.Tokenizer | None = None
  step: int | None = None
  record: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(
    cls, path: "str | pathlib.Path | Source | None", step: int | None = None
  ) -> "Source":
    """What is known of a folder; `step` is of a workdir, None means the last.

    Errors are those of `folders.settings`.
    """
    if isinstance(path, cls):
      return path
    if path is None:
      return cls()
    path = storage.local(path)
    cfg, codec = folders.settings(path, step)
    kind, record = folders.kind(path), {}
    if kind == "workdir":
      with checkpoints.Checkpoints(path / "checkpoints") as saved:
        step = saved.newest() if step is None else step
        record = saved.metadata(step)
    return cls(kind, path, cfg, codec, step, record)

  @property
  def length(self) -> int | None:
    """Tokens of the sequences that it was trained on, where that is known."""
    if self.path is None:
      return None
    return folders.trained_length(self.kind, self.path, self.cfg)

  def files(self) -> dict[str, bytes]:
    """Content of the licences and of the model card, by name."""
    if self.path is None:
      return {}
    files = {
      file.name: file.read_bytes()
      for pattern in _LICENCES
      for file in sorted(self.path.glob(pattern))
      if file.is_file()
    }
    cards = [self.path / name for name in ("README.md", PREVIOUS)]
    texts = [card.read_bytes() for card in cards if card.is_file()]
    return files | ({PREVIOUS: b"\n\n".join(texts)} if texts else {})

  def origin(self) -> str:
    """Where the weights come from, as far as is known, in lines."""
    if self.path is None:
      return "* unknown"
    name = self.path.resolve().name
    lines = [f"the folder `{name}`"]
    if self.kind == "workdir":
      lines = [f"a training run of mtp_jax, `{name}`", *self._training()]
    if any((self.path / card).is_file() for card in ("README.md", PREVIOUS)):
      whose = "of that model, the" if self.kind == "workdir" else "its own"
      lines.append(f"{whose} model card is `{PREVIOUS}`")
    return "\n".join(f"* {line}" for line in lines)

  def _training(self) -> list[str]:
    """What the checkpoint says of its training."""
    record = self.record
    data, train = record["config"]["data"], record["config"]["train"]
    source = data["source"]
    if data.get("path"):
      source += f" of `{pathlib.PurePath(data['path']).name}`"
    lines = [
      f"step {self.step} of {train['steps']}, each of {data['batch']} "
      f"sequences of {data['seq_len']} tokens, on {source} (fingerprint "
      f"{record['data']['train']})"
    ]
    if (frozen := train.get("freeze", "none")) != "none":
      lines.append(f"it did not change the {frozen}, head 1 included")
    if origin := record.get("init"):
      name = pathlib.PurePath(origin.get("path", "a model in memory")).name
      begin = f"it began with the weights of `{name}`"
      if origin.get("step") is not None:
        begin += f", step {origin['step']}"
      begin += f" (fingerprint {origin.get('fingerprint')})"
      heads = origin.get("heads")
      return [*lines, f"{begin}; {heads}" if heads else begin]
    return [*lines, "it began with random weights"]


def write(
  name: str,
  cfg: config.Model,
  tree: dict[str, Any],
  source: Source,
  notes: str | None,
) -> str:
  """The text of a folder's README.md.

  Args:
    name: of the folder.
    cfg: of the model.
    tree: the content of its config.json.
    source: where it comes from.
    notes: see `export.save`.
  """
  N, family = cfg.n_future, tree["model_type"].title()
  what = "A language model that predicts the next token. "
  if N > 1:
    what = (
      f"A language model with {N} heads, of kind '{cfg.head}': head i predicts "
      "the i-th next token (multi-token prediction, arXiv 2404.19737). "
    )
  rows = [
    (
      "`config.json`, `model*.safetensors`",
      f"trunk and head 1: an ordinary {family} model in {tree['dtype']}",
    )
  ]
  if N > 1:
    rows.append(
      (
        f"`{extra_heads.NAME}`",
        f"{f'heads 2 to {N}' if N > 2 else 'head 2'}; the docstring of "
        "`mtp_jax.interchange.extra_heads` says how they lie",
      )
    )
  table = "\n".join(f"| {file} | {text} |" for file, text in rows)
  parts = [
    _front_matter(source),
    f"# {name}\n",
    what
    + f"{tree['num_hidden_layers']} layers up to head 1, width {cfg.width}, "
    f"vocabulary {cfg.vocab}.\n",
    f"| file | content |\n|---|---|\n{table}\n",
    f"## Where the weights come from\n\n{source.origin()}\n",
    f"## Notes\n\n{notes.strip()}\n" if notes else "",
    _USE,
  ]
  return "\n".join(part for part in parts if part)


def _front_matter(source: Source) -> str:
  """What a hub reads, with the licence that the original's card names."""
  lines = ["library_name: mtp_jax", "tags:", "- multi-token-prediction"]
  names = ("README.md", PREVIOUS) if source.path else ()
  cards = [source.path / name for name in names]
  if card := next((card for card in cards if card.is_file()), None):
    text = card.read_text("utf-8", errors="replace")
    if header := re.match(r"---\n(.*?\n)---\n", text, re.S):
      licence = r"^license(?:_name|_link)?: .*$"
      lines += re.findall(licence, header[1], re.M)
  return "\n".join(["---", *lines, "---\n"])
