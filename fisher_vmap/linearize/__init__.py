"""The linear map from a bias to the head's input: its products, and their comparison with plain autograd.

linear_map      LinearMap, the base class: J^T u (pull) and J v (push); KernelOptions; the contexts it runs in
block           the products through one decoder block at a time, at the live rows
last_block      the last block, from the targets to the live rows
blockwise       Blockwise: the linear map one block at a time, from a recorded forward
whole           Whole and Loop: the linear map in one piece, by `torch.func` or by plain autograd
output          the next-token distribution: log p, the gradients of log p, the output metric C
scores          the scores of a batch by one pull; opening a form by its name
model_info      ModelInfo, Parts, Choice: what is known of a model
probe           finds out what is known of a model, once
find_head       finds the final norm, the unembedding and the function of the logits
plain           the reference: the model itself on one prompt, and plain autograd
compare         a form compared with plain autograd before it is used; how large a distance is allowed
select          which form each layer gets
audit           comparisons with plain autograd while the model is in use
residual_norms  the norm of the residual stream at a layer, a number a prompt
network         LinearizedNetwork, the linear map for users
"""
