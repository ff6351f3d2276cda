"""Checks of a results folder: its bytes, and its numbers against the model."""
