"""The model and its inputs: layers, prompts as it sees them, its head, and the conditions it runs under.

layers        decoder blocks and other modules that can be hooked; where their output has prompts and positions
layout        prompts padded or packed, targets, biased positions and live rows
targets       the positions whose next-token distribution is read
groups        packed prompts that attend together
rope_scaling  rotary frequencies that depend on the batch
head          the head in float32: final norm, unembedding, function of each logit
steps         the hook of a step: a vector added at chosen positions of a module's output
recording     a forward that records the calls of the decoder blocks, and replays of them
steps         the hook of a step: which rows of an output it is added to
offload       weights on several devices, or offloaded by accelerate
widening      a model with narrow weights computed in float32
precision     which precision is faster on this processor
patches       autocast, compiled and wrapped forwards, autograd functions, experts: undone in a call; `Remembered`
wrappers      the transformers model inside PEFT, nnsight, TransformerLens and others; the user's hooks
validation    checks of arguments; kinds of errors
"""
