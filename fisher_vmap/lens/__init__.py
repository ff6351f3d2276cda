"""The Jacobian lens (Gurnee et al., Transformer Circuits, July 2026): where a residual stream goes, on average.

For each layer l the corpus mean over prompts of (1/|V|) sum over t, t' in V, t' >= t, of d h_t' / d h_l,t, with h the
last block's output before the final norm and V a prompt's positions without the first few and the last one. That is the
linear map of `linearize` with the bias at V, the targets V, and the unit vectors as cotangents, divided by |V|.

jacobian_lens    `JacobianLens`: the matrices, and their files
matrices         a batch's matrices, and the mean output metric C beside them
sums             sums over prompts, on the disk and in memory
folder           lens.json and the other files of a fit
opening          open a fit: model, layers and data, compared with the folder
fit              prompts shard by shard into sums, in this process
ray              the same on Ray
finish           the lens from all sums
reading          what a lens reads at each layer and position, and how much the output cares
stored_readouts  readouts of texts, for the report
flags            the flags of `fisher-vmap lens`, and its settings
__main__         `python -m fisher_vmap.lens`
"""
