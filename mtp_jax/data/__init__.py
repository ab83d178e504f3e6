"""The corpus: from files to batches.

formats      the records of one file: text, JSONL, ArrayRecord, Python
corpora      the documents of a corpus, in a fixed order
splits       which documents are trained on and which are held out
pack         a corpus as arrays of tokens, cached on disk
cache_entry  the files of one cached corpus, with checksums
blocks       arrays on disk that are verified when they are read
batch        what a step trains on
rows         short documents, whole, in rows of one length
packed       windows and excerpts of a packed split
pipeline     shuffled batches, a pure function of (seed, step, shard)
"""
