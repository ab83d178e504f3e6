"""Models in the formats of others: Hugging Face's and Meta's folders.

folders              what a folder holds; reads any of them, a run's too
hugging_face         Hugging Face's folders: weights in and out
hugging_face_config  their config.json as a `config.Model`, and back
extra_heads          the file of heads 2..N beside such a folder's weights
meta                 Meta's folders
names                our parameters and the tensors of both formats: one table
streaming            a model from tensors, one at a time
export               writes folders of either format
model_card           the page that goes with them
tokenizer_files      tokenizers as files that both libraries read
safetensors_file     writes files of safetensors
torch_files          files of `torch.save`, without torch
pickles              the records in them, without `pickle`
"""
