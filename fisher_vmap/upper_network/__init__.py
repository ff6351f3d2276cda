"""The network above the hook, linearised: cotangents down and tangents up, in three forms."""
