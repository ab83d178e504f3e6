"""Tasks: the documents of each, and its measure.

pairs      prompts and answers as a file to finetune on
summaries  texts and their summaries: the paper's sets, and two built in
man_pages  manual pages as text
"""
