"""Where a model's files are, what identifies them, and how they become a model on its devices."""
