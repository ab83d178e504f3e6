"""Tiny tokenizer.json files of the kinds that others have."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = "To be, or not to be: that is the question.\ndef f(x):\n  return x\n"
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
KINDS = ["byte_level", "llama", "metaspace"]


def train(kind):
  """A tiny model, of GPT-2's kind or of the two kinds of Llama 2."""
  model = tokenizers.Tokenizer(models.BPE(unk_token=None))
  alphabet, specials = [], SPECIAL
  if kind == "byte_level":
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
  else:
    model.model = models.BPE(unk_token="<unk>", byte_fallback=True)
    specials = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    model.decoder = decoders.Sequence(
      [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
      ]
    )
    if kind == "llama":
      model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
      )
    else:
      model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  model.train_from_iterator(
    [TEXT] * 3,
    trainers.BpeTrainer(
      vocab_size=len(specials) + len(alphabet) + 60,
      special_tokens=specials,
      initial_alphabet=alphabet,
      show_progress=False,
    ),
  )
  fields = json.loads(model.to_str())
  # The bytes of others' models are pieces of the vocabulary, not added tokens.
  fields["added_tokens"] = fields["added_tokens"][: len(SPECIAL)]
  return fields


def write(folder, fields, **files):
  folder.mkdir(parents=True, exist_ok=True)
  files = {"tokenizer": fields} | files
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


END = {"__type": "AddedToken", "content": "</s>"}
NAMES = {"bos_token": "<s>", "eos_token": END}
