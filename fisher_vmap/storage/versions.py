"""Versions of what the numbers depend on, told without importing any of it."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fisher_vmap", "torch", "transformers", "numpy", "safetensors", "pyarrow", "datasets")


def installed_versions() -> dict[str, str]:
    """Package name -> version, of those that are installed; "python" too."""
    found = {"python": platform.python_version()}
    found.update((package, number) for package in PACKAGES if (number := _version(package)) is not None)
    return found


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
