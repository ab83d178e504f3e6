"""Measures of a trained model.

heads       loss and accuracy of each head, expected tokens per forward
choices     head 1's first choices at some places of a text
likelihood  log-likelihoods of texts, for benchmarks of choices
harness     a model as lm-evaluation-harness asks for it
rouge       what a summary and a reference have in common
sandbox     runs programs that a model wrote; isolation: how they are kept apart
pass_at_k   how likely one of k samples solves a problem
"""
