"""The book's tests import sybil: they are not collected where it is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sybil") else ["test_book.py"]
