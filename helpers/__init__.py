"""Cheaper language-model generation: packed mixed-precision KV caches and what is needed to study them.

Read in this order: `quantization` (bits and bytes), `packed_store` and `kv_cache` (the cache), `attention` (reading
it), `features` and `policies` (choosing widths), `generation` (running a model under a policy), `collection` (Part 1),
`quality` and `metrics` (measuring), `models`, `hub` and `corpora` (what runs on what), `processes` (on how many),
`pretrain` (the project's own models), `shapes` and `benchmark` (times of models of other sizes), `plots`, `files`,
`publish`.
"""
