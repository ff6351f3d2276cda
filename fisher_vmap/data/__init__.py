"""Data sets, their prompts, and tokens in batches."""
