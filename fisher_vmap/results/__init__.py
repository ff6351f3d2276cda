"""The results folder: written, resumed, read and shared.

files         files written whole or not at all, checks that they are unchanged, locks
index         index.json and the entry files: what is stored, from which settings
folder        which folders a run may use, and which files in it are ours
record        the records of one prompt, as computed and as read
targets       the targets of a prompt, if there are several
kept          values of kept columns: stored, and compared with what `where` asks for
shard         writing a shard: safetensors, and its rows of the prompts table
shard_reader  reading a shard; choosing prompts by `where`
means         the mean matrix: running sums, mean.safetensors, and which layers are too wide for one
outputs       the files made from all shards: mean, table, npz, metadata
writer        ResultsWriter: open or resume a folder, store shards, finish
same_prompts  two folders of the same prompts, side by side
traded        the tokens that directions trade over many prompts
comparison    how the matrices of the same prompts differ between two folders
reader        open_results and Results: prompts, stacks, means
local_paths   paths of this machine in settings, and settings without them
card          the data card
hub           upload to and download from the Hugging Face hub
"""
