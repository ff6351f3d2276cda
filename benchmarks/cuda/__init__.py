"""What only a GPU can tell, by one command: `python -m benchmarks.cuda --budget 480 --json cuda.json`.

__main__      the command: the parts in their order, and what each may take of the time
session       the record of a run, written after each result; a failure is told and kept, and ends nothing else
device_tests  the tests marked `on_device`, on the device
shapes        the models' configurations, and the rows in order of importance
rows          a row: the loops and the package by turns, the floor, memory, agreement
profiles      the kernels of a row, their launches, and the time between them
small_svd     the ways to decompose a batch of factors

It needs no network, no tokenizer, and neither `datasets` nor pydantic. Models have random weights, made on the device.
"""
