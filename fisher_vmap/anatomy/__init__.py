"""What a model is made of, found by watching it, and how it is prepared and put back: the ground of the kernel.

Blocks and the residual streams between them, modules that can be hooked, what is no causal LM, recorded forwards, and
prompts laid out as rows.
"""
