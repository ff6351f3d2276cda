"""A run: its settings, its batches, and how it is shared out."""
