"""Settings from flags and a YAML file: their types, their checks, and how a mistake is told."""
