"""A model and its tokenizer, from a hub, a folder, a file or an adapter."""
