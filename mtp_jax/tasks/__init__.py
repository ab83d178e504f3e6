"""Tasks: the documents of each, and its measure.

pairs  prompts and answers as a file to finetune on
"""
