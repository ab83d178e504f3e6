"""Tokenizers as files that both this library and transformers read."""

import json
import pathlib

from mtp_jax import tokenizer

# What lies beside the weights in folders of others.
_NAMES = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "generation_config.json",
)


def of_folder(folder: pathlib.Path) -> dict[str, bytes]:
  """Content of a Hugging Face folder's files of the tokenizer, by name."""
  files = {name: folder / name for name in _NAMES}
  return {n: path.read_bytes() for n, path in files.items() if path.is_file()}


def of(
  codec: tokenizer.Tokenizer, model_is_new: bool = True
) -> dict[str, bytes]:
  """Content of the files of a tokenizer, by name.

  Args:
    codec: the tokenizer.
    model_is_new: leaves out settings of generation, such as a temperature,
      since they belong to the model that the tokenizer was made for.
  """
  files = codec.files()
  config = json.loads(files.get("tokenizer_config.json", "{}"))
  config.pop("auto_map", None)  # names a Python file
  if "tokenizer.model" in files:
    config |= _llama_tokenizer(codec)
  else:
    # Another class, or these fields, may split differently from tokenizer.json.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("add_eos_token", "from_slow"):
      config.pop(name, None)
  found = json.loads(files.get("generation_config.json", "{}"))
  generation = ({} if model_is_new else found) | ids(codec)
  return files | {
    "tokenizer_config.json": f"{json.dumps(config, indent=2)}\n".encode(),
    "generation_config.json": f"{json.dumps(generation, indent=2)}\n".encode(),
  }


def ids(codec: tokenizer.Tokenizer) -> dict[str, int | list[int]]:
  """The special ids, as generation_config.json has them."""
  return {
    "bos_token_id": codec.bos,
    "eos_token_id": list(codec.ends),
    "pad_token_id": codec.pad,
  }


def _llama_tokenizer(codec) -> dict[str, str | bool]:
  """Settings under which transformers reads a SentencePiece model as we do."""
  a = codec.encode("a")
  return {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": codec.prefix == (codec.bos,),
    "add_eos_token": False,
    "add_prefix_space": codec.decode_bytes(a, after=a).startswith(b" "),
    "legacy": False,
  }
