"""Derivatives written out as rules, for all cotangents at once.

autograd          base classes of the rules, norm and softmax pullbacks, memory that is reused
attention         scaled dot-product attention
hf_attention      transformers' models made to call it; packed prompts kept apart
rotary_attention  attention modules for pushes, and for blocks without a rule
modules           norms
parts             what a block's rule is put together from, and what a pullback needs of the forward
mlp               MLPs, gated or not
experts           mixtures of experts
attention_rule    attention modules: projections, norms, rotations and attention
decoder_block     whole decoder blocks, put together from these
compose           how blocks are made, found by values; the rules proven
quantized         linear layers with quantised weights
"""
