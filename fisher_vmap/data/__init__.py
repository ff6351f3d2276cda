"""Data sets, their prompts, and tokens in batches.

datasets  rows of local files, of folders, and of data sets of the hub
prompts   the prompts of a run, and of each of its shards
tokenize  prompts to token ids, and token ids to text
batching  which prompts are computed together, and their results
"""
