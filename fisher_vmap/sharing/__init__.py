"""What leaves this machine: data cards, files of directions, and paths that stay here."""
