"""Data set -> rows -> prompts -> tokens -> batches, and a batch's numbers back to its prompts."""
