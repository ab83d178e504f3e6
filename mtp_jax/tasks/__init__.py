"""Tasks: the documents of each, and its measure.

arithmetic     polynomials over F_7 modulo X^5
induction      a name that a story has mentioned is known again
stories        children's stories, in which a name is two tokens
star_graph     the path from a centre to a goal
choice_points  a language whose choice points are known
pairs          prompts and answers as a file to finetune on
summaries      texts and their summaries: the paper's sets, and two built in
man_pages      manual pages as text
code           programming problems: what is read, where answers end, tests
problem_files  the public files of such problems
benchmark_files  those of language benchmarks, checked
json_rows      the objects of a file of JSON
functions      small generated functions, to learn from and to write
subset         some of a task's problems, in equal steps
samples        answers that a model draws to them
judging        which of these answers pass their tests
"""
