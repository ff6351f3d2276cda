"""What a model is made of: its layers, its layout, its head, and what surrounds a call of it."""
