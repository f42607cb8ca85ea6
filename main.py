"""Command line over `helpers`: `python main.py COMMAND --help` shows the options of a command.

Without a command: the report on entropy-gated generation, as `python main.py gate`.
"""

import argparse
import os
import sys
from pathlib import Path

SHARED_COMMANDS = ("collect", "compare")  # whose work `accelerate launch` or `torchrun` can spread over processes


def collect(options: argparse.Namespace) -> None:
    from helpers.io.paths import relative_to_root
    from helpers.io.processes import is_main_process, one_first
    from helpers.models.items import load_multiple_choice, sample_texts
    from helpers.models.loading import load_model
    from helpers.models.presets import get_preset
    from helpers.models.tokens import encode
    from helpers.policies.rules import EntropyRule
    from helpers.training.collection import collect
    from helpers.training.table import summarise

    preset = get_preset(options.preset)
    source = options.model or preset.model
    texts_source = options.texts or preset.multiple_choice
    with one_first():
        model, tokenizer = load_model(source, quiet=not is_main_process())
        items = load_multiple_choice(texts_source, preset.train_split)
    texts = sample_texts(items, options.count, options.seed)
    ids = [encode(tokenizer, text, options.max_tokens) for text in texts]
    out = Path(options.out or preset.data_dir / "controller_training.csv")
    names = {"model": relative_to_root(source), "source": relative_to_root(texts_source), "preset": preset.name}
    table = collect(model, ids, out, EntropyRule(), options.block, names)
    if is_main_process():
        print(summarise(table))
        print(f"\n{len(table)} tokens of {len(ids)} texts -> {relative_to_root(out)}")


def quality(options: argparse.Namespace) -> None:
    import pandas as pd
    import torch

    from helpers.evaluation.fixed_widths import SAMPLED_METHODS, TEXT_METHODS, quality_table, sample_sequences
    from helpers.io.atomic import atomic_path
    from helpers.io.paths import relative_to_root
    from helpers.io.provenance import provenance
    from helpers.io.results import write_json
    from helpers.models.loading import load_model
    from helpers.models.presets import get_preset
    from helpers.models.stories import load_stories, split_holdout
    from helpers.models.tokens import pack_tokens

    preset = get_preset(options.preset)
    source, texts = options.model or preset.model, options.texts or preset.stories
    model, tokenizer = load_model(source)
    sampled = sample_sequences(model, options.sequences, 256, options.seed)
    held_out = load_stories(texts)
    if options.last < 1:
        _, held_out = split_holdout(held_out, options.last)
    rows = pack_tokens(tokenizer(held_out, verbose=False)["input_ids"], 512)[: options.max_rows]
    if not rows:
        raise ValueError(f"--texts {texts}: less than 512 tokens in the share that --last {options.last} reads")
    packed = torch.tensor(rows).to(model.device)
    tables = [quality_table(model, sampled, SAMPLED_METHODS, "sampled")]
    tables.append(quality_table(model, packed, TEXT_METHODS, "held-out text, positions 256-511", first=256))
    table = pd.concat(tables)
    shown = table.round({c: 4 for c in table.columns if c.startswith(("kl", "acc"))} | {"bits_per_element": 2})
    print(shown.drop(columns=["tokens"]).to_string(index=False))
    out = Path(options.out or preset.data_dir / f"quality_{Path(source).name}.csv")
    with atomic_path(out) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    names = {"model": relative_to_root(source), "source": relative_to_root(texts), "seed": options.seed}
    write_json(out.with_suffix(".json"), names | provenance())


def train(options: argparse.Namespace) -> None:
    from helpers.io.paths import relative_to_root
    from helpers.models.loading import load_model
    from helpers.models.presets import get_preset
    from helpers.policies.rules import EntropyRule
    from helpers.training.collection import collect
    from helpers.training.controllers import train_controllers

    preset = get_preset(options.preset)
    source, texts = options.model or preset.model, options.texts or preset.stories
    model, tokenizer = load_model(source)
    rows = _packed_rows(tokenizer, texts, preset.train_split, 512, options.rows, first_share=0.9)
    out = Path(options.out or preset.data_dir / "controllers")
    short = [row[:256] for row in rows[:: max(1, len(rows) // 24)]]
    table = collect(model, short, out / "collected.csv", EntropyRule(), source={"model": relative_to_root(source)})
    summary = train_controllers(model, table, rows, out, relative_to_root(source), options.seed)
    print(summary.to_string(index=False))
    print(f"controllers of {len(table)} tokens and {len(rows)} rows of 512 -> {relative_to_root(out)}")


def compare(options: argparse.Namespace) -> None:
    import torch

    from helpers.evaluation.comparison import compare, save_comparison, standard_pairs
    from helpers.evaluation.methods import default_methods
    from helpers.io.paths import relative_to_root
    from helpers.io.processes import is_main_process, one_first, process_count
    from helpers.models.items import load_multiple_choice, sample_items
    from helpers.models.loading import load_model
    from helpers.models.presets import get_preset

    preset = get_preset(options.preset)
    source, texts = options.model or preset.model, options.texts or preset.stories
    items_source = options.items or preset.multiple_choice
    with one_first():
        model, tokenizer = load_model(source, quiet=not is_main_process())
        items = load_multiple_choice(items_source, preset.test_split) if options.count else []
        rows = _packed_rows(tokenizer, texts, preset.test_split, 512, options.max_rows, last_share=0.1)
    stores = default_methods(options.controllers or preset.data_dir / "controllers")
    items = sample_items(items, min(options.count, len(items)), options.seed) if items else []
    packed = torch.tensor(rows).to(model.device)
    result = compare(model, tokenizer, packed, items, stores, rounds=options.rounds, batch=options.batch)
    if not is_main_process():
        return
    shown = ["method", "code_bits", "bits_per_element", "kl", "accuracy", "accuracy_change", "acc", "latency_ms"]
    print(result.table[[c for c in shown if c in result.table]].round(4).to_string(index=False))
    print(standard_pairs(result).round(5).to_string(index=False))
    name = "baseline_comparison" if not options.model else f"baseline_comparison_{Path(source).name}"
    name = options.name or name
    about = {"model": relative_to_root(source), "texts": relative_to_root(texts), "rows": len(rows)}
    about |= {"items": relative_to_root(items_source), "item_count": len(items), "seed": options.seed}
    about |= {"processes": process_count()}
    save_comparison(result, Path(options.out or preset.data_dir), name, about)


def _packed_rows(tokenizer, texts, split, length, most, first_share=None, last_share=None) -> list[list[int]]:
    """Rows of `length` tokens of a text source: of a file without splits only its first or last share."""
    from helpers.models.stories import load_stories, split_holdout
    from helpers.models.tokens import pack_tokens

    stories = load_stories(texts, split)
    if not texts.endswith(".jsonl"):
        stories = split_holdout(stories, last_share or 1 - first_share)[1 if last_share else 0]
    rows = pack_tokens(tokenizer(stories, verbose=False)["input_ids"], length)[:most]
    if not rows:
        raise ValueError(f"--texts {texts}: less than {length} tokens in the part that is read")
    return rows


def card(options: argparse.Namespace) -> None:
    import pandas as pd

    from helpers.io.paths import ROOT
    from helpers.models.items import load_multiple_choice
    from helpers.models.presets import get_preset
    from helpers.publishing import plots
    from helpers.training.model_card import PAIR, measure_pair, write_card

    preset, folder = get_preset("embedded"), ROOT / "data" / "models"
    logs = {}
    for name in PAIR:
        log = pd.read_csv(folder / name / "training_log.csv")
        settings = pd.read_json(folder / name / "training.json", typ="series")["settings"]
        logs[name] = log.assign(tokens=log["step"] * settings["batch"] * settings["context"])
    figure = plots.training_curves(logs, "The large model pulls ahead and stays there", "mean loss of 50 steps each")
    plots.save_figure(figure, preset.figures_dir, "00_training_curves")
    measured = measure_pair(folder, load_multiple_choice(preset.multiple_choice), options.holdout_text)
    write_card(folder, measured)
    for name in PAIR:
        print(name, measured[name], f"{measured['ms_per_token'][name]:.2f} ms per token")


def gate(options: argparse.Namespace) -> None:
    from helpers.gate.study.report import report
    from helpers.io.paths import ROOT
    from helpers.models.presets import get_preset

    settings = {k: v for k, v in vars(options).items() if k not in ("command", "run", "preset", "recalibrate")}
    cache_dir = None if options.recalibrate else ROOT / "data" / ".calibration"
    report(get_preset(options.preset), cache_dir=cache_dir, **settings)


def gate_fidelity(options: argparse.Namespace) -> None:
    from helpers.gate.study.fidelity import FidelitySettings, report_fidelity
    from helpers.models.presets import get_preset

    chosen = {name: getattr(options, name) for name in ("stories", "random_seeds", "max_new_tokens", "seed")}
    report_fidelity(get_preset(options.preset), FidelitySettings(cuts=tuple(options.cuts), **chosen), options.out)


def gate_bench(options: argparse.Namespace) -> None:
    from helpers.gate.study.benchmark import GateBenchmark, report

    report(GateBenchmark(**{k: v for k, v in vars(options).items() if k not in ("command", "run", "out")}), options.out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--preset", help="embedded (default), smollm or llama; also the variable PRESET")
    shared.add_argument("--model", help="folder or hub name instead of the preset's model")
    shared.add_argument("--texts", help="file or hub name instead of the preset's texts")
    shared.add_argument("--out", help="result file instead of the preset's")
    shared.add_argument("--seed", type=int, default=0)

    command = commands.add_parser("collect", parents=[shared], help="log features and widths, token by token (Part 1)")
    command.add_argument("--count", type=int, default=24, help="number of texts")
    command.add_argument("--max-tokens", type=int, default=256, help="tokens of each text that are read")
    command.add_argument("--block", type=int, default=16)
    command.set_defaults(run=collect)

    command = commands.add_parser("quality", parents=[shared], help="KL and accuracy of fixed widths, block by block")
    command.add_argument("--sequences", type=int, default=200, help="sequences that the model samples")
    command.add_argument("--last", type=float, default=0.1, help="share of the texts, from the end, that is read")
    command.add_argument("--max-rows", type=int, default=200, help="rows of 512 tokens of text at most")
    command.set_defaults(run=quality)

    command = commands.add_parser("train", parents=[shared], help="train the controllers of a model (Part 2)")
    command.add_argument(
        "--rows", type=int, default=40, help="rows of 512 tokens of the first nine tenths of the texts"
    )
    command.set_defaults(run=train)

    command = commands.add_parser("compare", parents=[shared], help="all policies and baselines on one model (Part 4)")
    command.add_argument("--controllers", help="folder of controllers instead of the preset's")
    command.add_argument("--items", help="multiple-choice file or hub name instead of the preset's")
    command.add_argument("--count", type=int, default=200, help="multiple-choice items, drawn at random; 0 for none")
    command.add_argument("--max-rows", type=int, default=200, help="rows of 512 tokens of the last tenth of the texts")
    command.add_argument("--rounds", type=int, default=3, help="rounds of timed decoding; 0 for none")
    command.add_argument("--name", help="of the result files instead of baseline_comparison or ..._MODEL")
    command.add_argument("--batch", type=int, default=25, help="rows read at once: what several processes share out")
    command.set_defaults(run=compare)

    command = commands.add_parser("card", help="measure the embedded pair again and rewrite its card")
    command.add_argument("--holdout-text", help="the story file whose last tenth was held out in training")
    command.set_defaults(run=card)

    commands.add_parser("bench", help="kernels and decode steps against the caches of transformers")

    command = commands.add_parser("gate", help="compare entropy-gated generation with its baselines (the default)")
    command.add_argument("--preset", help="embedded (default), smollm or llama; also the variable PRESET")
    command.add_argument("--small", help="folder or hub name instead of the preset's small model")
    command.add_argument("--large", help="folder or hub name instead of the preset's large model")
    command.add_argument("--articles", help="file or hub name instead of the preset's prompts")
    command.add_argument("--calibration", help="file or hub name instead of the preset's calibration texts")
    command.add_argument("--percentile", type=float, default=50, help="of the signal on the calibration texts")
    command.add_argument("--calibration-texts", type=int, default=100, help="number of calibration texts")
    command.add_argument("--prompts", type=int, default=5, help="number of prompts")
    command.add_argument("--max-new-tokens", type=int, default=50)
    command.add_argument("--signal", default="entropy", help="entropy, max_prob, margin or random (the control)")
    command.add_argument("--rollback", type=float, help="bits: take back tokens that cost the large model more")
    command.add_argument("--target-usage", type=float, help="share of tokens instead of --percentile, corrected to it")
    command.add_argument("--correct", choices=("bisection", "online"), default="bisection", help="how to correct")
    command.add_argument("--repeats", type=int, default=1, help="runs of each prompt, of which the median time counts")
    command.add_argument("--max-prompt-tokens", type=int, default=1024, help="articles are cut to this")
    command.add_argument("--fixed-length", action="store_true", help="write on after the end of a text")
    command.add_argument("--recalibrate", action="store_true", help="do not use thresholds found before")
    command.add_argument("--out", help="CSV file for the results of each prompt")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=gate)

    command = commands.add_parser("gate-fidelity", help="what every signal of the gate is worth over random calls")
    command.add_argument("--preset", help="embedded (default), smollm or llama; also the variable PRESET")
    command.add_argument("--stories", type=int, default=57, help="stories of each split at most")
    command.add_argument("--cuts", type=int, nargs="+", default=[30, 60, 90], help="words after which stories are cut")
    command.add_argument("--random-seeds", type=int, default=5, help="seeds of the random control")
    command.add_argument("--max-new-tokens", type=int, default=50)
    command.add_argument("--out", help="CSV file instead of the preset's gate_fidelity.csv")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=gate_fidelity)

    command = commands.add_parser("gate-bench", help="speed of the gate with models of real sizes, random weights")
    command.add_argument("--pair", default="SmolLM-135M+360M", help="embedded, SmolLM-135M+360M or SmolLM-135M+1.7B")
    command.add_argument("--usage", type=float, default=0.2, help="share of the tokens that the large model writes")
    command.add_argument("--prompts", type=int, default=5)
    command.add_argument("--prompt-tokens", type=int, default=32)
    command.add_argument("--new-tokens", type=int, default=50)
    command.add_argument("--rounds", type=int, default=3, help="runs of each prompt, of which the median counts")
    command.add_argument("--dtype", help="float32, float16 or bfloat16 instead of what suits the device")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", help="JSON file instead of data/benchmarks/gate_<pair>.json; - for none")
    command.set_defaults(run=gate_bench)

    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["gate", *arguments]
    if arguments[0] == "bench":  # its options are those of the module
        from helpers.evaluation.benchmark.command import main as bench

        return bench(arguments[1:])
    options = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and options.command not in SHARED_COMMANDS:
        parser.error(f"{options.command} runs in one process; several can share {' and '.join(SHARED_COMMANDS)}")
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
