"""Cheaper language-model generation: packed mixed-precision KV caches and entropy-gated generation.

Eight packages, each importing only from those before it:

* `io`: files that appear whole or not at all, provenance, processes that share work.
* `cache`: the packed key/value cache: quantization, storage, attention that reads it, its bytes.
* `models`: presets, loading models (hub, folder, GGUF, package), texts, shapes of published models.
* `policies`: which width each token gets: rules, schedules, learned controllers; the driver that applies them.
* `evaluation`: methods side by side: quality, multiple choice, latency, memory, benchmarks.
* `training`: what controllers learn from and how they are fitted; pretraining of the embedded models.
* `gate`: entropy-gated generation by two models; what measures it is in `gate.study`.
* `publishing`: figures, interactive explorers, running the notebooks, generated tables.

A reader starts with `cache`, `policies` and `gate`; the rest is the laboratory.
"""
