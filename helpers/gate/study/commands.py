"""The commands of this package: `python main.py gate` (the default), `train-gate`, `gate-fidelity`, `gate-bench`."""

from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.gate.pairs import load_pair
from helpers.gate.study.benchmark import GateBenchmark, run_gate_benchmark
from helpers.gate.study.fidelity import FidelitySettings, report_fidelity
from helpers.gate.study.report import ReportSettings, report_gate
from helpers.gate.training import sample_openings, save_signal, signal_examples, train_signal
from helpers.io import relative_to_root
from helpers.models import get_preset, in_folder, load_stories
from helpers.training.controllers import write_controller_card


class _Unchecked:
    """Options unchecked: what is wrong with them is found, and told in one line, when the command runs."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class TrainGateOptions:
    """What the learned signal is trained on."""

    openings: int = 8000  # texts that are begun
    texts: str | None = None  # file or hub name whose texts are begun; by default openings that the large model writes
    words: int = 60  # of each of these texts
    new_tokens: int = 50  # tokens that are written on each
    usage: float = 0.2  # share of them that the large model writes, at random
    seed: int = 0


class GateOptions(_Unchecked, ReportSettings):
    """What is compared, on which prompts, and how the gate's threshold is found."""


class FidelityOptions(_Unchecked, FidelitySettings):
    """Which prompts and which gates."""


class GateBenchOptions(_Unchecked, GateBenchmark):
    """What is timed."""


def gate(options: GateOptions, preset: str | None = None, texts_dir: str | None = None, out: str | None = None) -> None:
    """Compare entropy-gated generation with its baselines and print the report.

    Args:
        preset: embedded (default), smollm or llama; also the variable PRESET
        texts_dir: folder of files in place of the hub's texts; also the variable TEXTS_DIR
        out: CSV file for the results of each prompt
    """
    texts = {
        name: in_folder(source, texts_dir) for name in ("articles", "calibration") if (source := getattr(options, name))
    }
    report_gate(get_preset(preset, texts_dir), ReportSettings(**vars(options) | texts), out)


def train_gate(
    options: TrainGateOptions, preset: str | None = None, texts_dir: str | None = None, out: str | None = None
) -> None:
    """Train the learned signal of a preset's pair, and write it among its controllers.

    Args:
        preset: embedded (default), smollm or llama; also the variable PRESET
        texts_dir: folder of files in place of the hub's texts; also the variable TEXTS_DIR
        out: folder instead of the preset's controllers
    """
    found = get_preset(preset, texts_dir)
    openings = []
    if options.texts:
        texts = load_stories(in_folder(options.texts, texts_dir), found.train_split)
        openings = [" ".join(text.split()[: options.words]) for text in texts[: options.openings]]
    pair, _ = load_pair(found)
    openings = openings or sample_openings(pair, options.openings, options.seed)
    examples = signal_examples(pair, openings, options.usage, options.new_tokens, seed=options.seed)
    network, history = train_signal(examples, seed=options.seed)
    names = relative_to_root(found.gate_small), relative_to_root(found.gate_large)
    source = relative_to_root(options.texts) if options.texts else "sampled from the large model"
    about = {"model": " and ".join(names), **asdict(options), "texts": source, "rows": len(examples.inputs)}
    about |= {"epoch": history.best, "held_out_loss": history.validation[history.best]}
    folder = Path(out or found.data_dir / "controllers")
    save_signal(network, pair, folder, about)
    write_controller_card(folder)
    print(f"{len(examples.inputs)} tokens of {len(openings)} texts; the models differ on {examples.differs.mean():.1%}")
    print(f"held-out loss {history.validation[history.best]:.4f} after {history.best + 1} epochs")
    print(f"-> {relative_to_root(folder / 'gate.safetensors')}")


def gate_fidelity(
    options: FidelityOptions, preset: str | None = None, texts_dir: str | None = None, out: str | None = None
) -> None:
    """Measure what every signal of the gate is worth over random calls.

    Args:
        preset: embedded (default), smollm or llama; also the variable PRESET
        texts_dir: folder of files in place of the hub's texts; also the variable TEXTS_DIR
        out: CSV file instead of the preset's gate_fidelity.csv
    """
    report_fidelity(get_preset(preset, texts_dir), FidelitySettings(**vars(options)), out)


def gate_bench(options: GateBenchOptions, out: str | None = None) -> None:
    """Time the gate with models of real sizes and random weights.

    Args:
        out: JSON file instead of data/benchmarks/gate_<pair>.json; - for none
    """
    run_gate_benchmark(GateBenchmark(**vars(options)), out)
