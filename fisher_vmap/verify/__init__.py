"""Checks of a results folder.

__main__: the command.
folder: checks of its files and numbers.
kl: its predictions compared with the model, and `measured_kl`.
"""
