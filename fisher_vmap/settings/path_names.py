"""Is what a user wrote a path of this machine, or a name on the hub? Told by its spelling, before anything is asked."""


def spelt_as_path(name: str) -> bool:
    """Whether it begins as a path does and no name on the hub can."""
    return name.startswith((".", "/", "~"))
