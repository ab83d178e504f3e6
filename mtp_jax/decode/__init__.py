"""Decoding: heads draft tokens, head 1 verifies them.

generate    prompts to texts, in one batch
serve       any number of prompts, in rows that are filled again
stream      one prompt, pass by pass
loop        one pass, and the loop of passes: pure functions of a state
layout      a model as a decoder
decoder     the passes of that decoder
window      what a pass has read
interface   what the loop asks of a decoder and of a rule
accept      the rules: which drafts are accepted
sampling    filters of logits, and draws
tree        trees of drafts; tree_file keeps them in files
autotune    which drafts pay
prompts     reads prompts in pieces
cache       keys and values; int8 and cpu lay out matrices
statistics  what is counted during decoding
checks      of the numbers that callers give
"""
