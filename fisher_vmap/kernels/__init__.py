"""Derivatives written by hand, for all cotangents at once."""
