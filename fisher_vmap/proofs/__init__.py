"""Which form a model can be trusted with, and why: structure first, then numbers on the run's own prompts."""
