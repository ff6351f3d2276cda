"""Derivatives written out as rules, for all cotangents at once.

autograd          base classes of the rules, norm and softmax pullbacks, memory that is reused
attention         scaled dot-product attention
hf_attention      transformers' models made to call it; packed prompts kept apart
rotary_attention  attention modules: projections, rotary embedding and attention
modules           norms
mlp               MLPs, gated or not
experts           mixtures of experts
decoder_block     whole decoder blocks
quantized         linear layers with quantised weights
"""
