"""The results folder: written, resumed, read and shared."""
