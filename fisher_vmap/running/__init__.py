"""A run in one process: opened from its settings, its batches computed while the next are made."""
