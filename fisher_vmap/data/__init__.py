"""Data sets, their prompts, and tokens in batches.

datasets: tables of the hub and of folders, by the `datasets` library, which only this module imports.
files: tables of local data files, row by row.
prompts: the prompts of a run, and of each of its shards.
tokenize: prompts to token ids, and token ids to text.
batching: which prompts are computed together, and their results.
"""
