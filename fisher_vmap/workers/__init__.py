"""The same run by several: what the driver of a Ray cluster does, and what each of its workers does."""
