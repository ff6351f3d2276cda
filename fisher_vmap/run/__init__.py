"""A run: from settings to a results folder.

__main__       the command
settings       every setting with its type, default and meaning
setting_types  what each type of setting accepts
cli_args       settings read from the command line and config.yaml
fingerprint    what a folder's results depend on
open           the model, prompts, renderer and folder of a run, with all checks before it begins
proof          the kernel proven on a run's first batch
written        completions that the model writes, once for each prompt
compute        shards computed and stored, in this process
bar            the progress bar
ray            the driver of a run on a Ray cluster
ray_worker     its workers
plan           `--plan`, what a run will take
plan_folder    the bytes of the folder that it leaves, and the memory of finishing it
plan_model     the operations and memory of a model, from its shapes
"""
