"""Data sets, their prompts, and tokens in batches.

files          rows of local files
datasets       rows of folders, and of data sets of the hub
conversations  the prompt in a cell: a text, or turns
prompts        the prompts of a run, and of each of its shards
render         prompts to token ids, by the chat template
pieces         token ids to text
sequences      prompts with their completions, and their targets
batching       which prompts are computed together, and their results
"""
