"""The Jacobian lens (Gurnee et al., Transformer Circuits, July 2026): where a residual stream goes, on average.

For each layer l the corpus mean over prompts of (1/|V|) sum over t, t' in V, t' >= t, of d h_t' / d h_l,t, with h the
last block's output before the final norm and V a prompt's positions without the first few and the last one. That is the
linear map of `linearize` with the bias at V, the targets V, and the unit vectors as cotangents, divided by |V|.

    jacobian_lens   `JacobianLens`: the matrices, and their files
    matrices        a batch's matrices, and the mean output metric C beside them
    sums            sums over prompts, on the disk and in memory
    fit             a fit, shard by shard, in this process or in several
    ray             the same on Ray
    reading         what a lens reads at each layer and position, and how much the output cares
    flags           the flags of `fisher-vmap lens`
    __main__        `python -m fisher_vmap.lens`
"""
