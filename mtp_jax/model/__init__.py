"""The network: layers, heads, and the model that joins them.

model       embedding, trunk and heads: the whole model
layers      the transformer layer, and how parameters are made
rotary      frequencies of rotary embeddings, scaled to long contexts
attention   causal attention: XLA, cuDNN or Pallas splash
heads       the kinds of heads, and N of them in a model
surgery     fewer heads, more heads, other kinds of heads
vocabulary  models with other ids: padded, or cut to some
cost        FLOPs of a model, and of the chips it runs on
"""
