"""Cheaper language-model generation: packed mixed-precision KV caches and what is needed to study them.

Public names, module by module, in the order in which a reader meets them.

The cache:

* `quantization`: `WIDTHS`, `quantize`, `dequantize`, `pack_codes`, `unpack_codes`, `rotation_matrix`
* `packed_store`: `Stage`, `Demotion`, `Bucket`, `PackedStore`
* `kv_cache`: `PackedKVCache`
* `memory`: `stored_bytes`, `live_bytes`, `explain_out_of_memory`
* `attention`: `use_packed_attention`

Choosing widths, and running a model under a choice:

* `features`: `entropy`, `confidence`, `surprisal`, `attention_variance`, `TokenCounts`, `TokenFeatures`
* `policies`: `Policy`, `FixedBits`, `EntropyRule`, `RandomBits`, `AgeSchedule`, `Step`
* `generation`: `PolicyDriver`, `decode`, `score_blocks`

Part 1, the training table:

* `models`: `Preset`, `get_preset`, `load_model`, `encode`
* `hub`: `fetch_model`, `fetch_dataset`
* `corpora`: `load_multiple_choice`, `load_stories`, `load_articles`, `load_paragraphs`, `pack_tokens`, `sample_texts`
* `collection`: `collect`, `read_training_data`, `summarise`

Part 2, the controllers:

* `sensitivity`: `exact_costs`, `fisher_costs`, `optimal_bits`, `head_costs`
* `controller`: `LossWeights`, `train_commit`, `train_settle`, `rate_distortion`, `LearnedController`
* `training`: `measure_costs`, `settle_examples`, `train_controllers`

Parts 3 and 4, measuring and comparing:

* `stores`: `Store`, `FullPrecision`, `StockQuantized`, `stock_stores`
* `metrics`: `kl_divergence`, `bootstrap_mean`, `bootstrap_median`, `bootstrap_groups`, `rouge_scores`
* `quality`: `measure_store`, `quality_table`
* `multiple_choice`: `score_items`
* `processes`: `process_count`, `spread`, `from_main`
* `comparison`: `default_stores`, `compare`, `Comparison`, `standard_pairs`, `follow_text`, `against_length`
* `shapes`: `SHAPES`, `shape_config`, `random_model`
* `benchmark`: `Settings`, `run`
* `benchmark_runs`: `Method`, `fill_cache`, `copy_bandwidth`
* `benchmark_results`: `check_bars`, `save_benchmarks`, `load_benchmarks`, `ratio_table`
* `benchmark_plots`: `benchmark_figure`

Part 5, two models:

* `gate`: `EntropyGate`, `OnlineTracker`, `gated_generate`, `trace`
* `gate_reader`: `Generated`, `Reader`, `check_same_tokens`
* `gate_baselines`: `plain_generate`, `assisted_generate`
* `calibration`: `calibrate`, `correct_by_bisection`, `measure_usage`
* `gate_evaluation`: `evaluate_gate`, `summarise_gates`, `speed_against_ideal`
* `gate_sweep`: `sweep_gates`, `gains_over_random`
* `gate_fidelity`: `FidelitySettings`, `measure_fidelity`
* `gate_benchmark`: `GateBenchmark`, `time_parts`, `parts_against_ideal`
* `gate_report`: `report`
* `onednn_linear`: `use_onednn_linear`
* `rouge`: `Rouge`

The project's own models:

* `pretrain`: `TrainingSettings`, `train_tokenizer`, `train`, `bits_per_byte`
* `model_card`: `measure_pair`, `write_card`

Showing and keeping results:

* `plots`: `save_figure`
* `explorers`: `width_explorer`, `policy_explorer`, `gate_explorer`
* `files`: `atomic_path`, `write_json`, `read_result`, `provenance`, `environment_table`
* `readme_tables`: `markdown_table`, `comparison_table`, `benchmark_table`
* `readme`: `write_readme`, `stale_blocks`
* `publish`: `publish`, `publish_fast`, `faults`
"""
