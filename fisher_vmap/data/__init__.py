"""Data sets, their prompts, and tokens in batches.

local_files    what a local file is, its bytes and lines; a folder's data files
files          rows of local files; tables, and how much of one a run takes
datasets       rows of folders, and of data sets of the hub
conversations  the prompt in a cell: a text, or turns
formats        a row's columns to its prompt, by the known formats or a template
answers        the completion beside a row's prompt
prompts        the prompts of a run, and of each of its shards
chat_template  turns to text, and texts that are rendered already
literal_text   names of special tokens as ordinary text
render         prompts to token ids, by the chat template
pieces         token ids to text
sequences      prompts with their completions, and their targets
batching       which prompts are computed together, and their results
"""
