"""The results folder: how it is written, resumed and checked. It knows numpy arrays and files, and no model.

Reading back is `fisher_vmap.results`. Imports inside this folder point one way, each line on those before it:

    atomic, records, tensors, versions      whole files; what a prompt's results are; the tensor format
    name_lists                              many names in a few words
    lock, checking, fingerprint             one writer at a time; is a file as written; is a folder of this run
    entries, index, table, layer_names      what is stored; the table; which layer is meant
    shards, tries, folder                   writing a shard; who died over it; which files are ours
    reading, soundness, beginning           one shard, lazily; which shards are sound; a folder made or carried on
    shard_readers                           the shards of a folder
    prompt_record, selection, mean, groups, npz, metadata
    folding, ledger                         shards into a running sum; index.json as one of several processes keeps it
    products, finishing, sharing            the files made from all shards; a copy without text
    summaries, writer                       what a folder says of all prompts; a folder that is being filled
"""
