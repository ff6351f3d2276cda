"""Pullbacks by hand: attention, norms, gated MLPs, whole blocks and quantised layers, all cotangents at once.

Each is used only where it is proven to be what the model computes; everything else goes through autograd.
"""
