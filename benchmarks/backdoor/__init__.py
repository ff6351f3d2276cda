"""A backdoor that is planted on purpose, and the hunt for it: docs/backdoor.md says what is asked, and how."""
