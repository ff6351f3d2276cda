"""Data sets, their prompts, and tokens in batches.

datasets: tables of rows, from the hub, folders and files.
files: rows of local data files.
prompts: the prompts of a run, and of each of its shards.
tokenize: prompts to token ids, and token ids to text.
batching: which prompts are computed together, and their results.
"""
