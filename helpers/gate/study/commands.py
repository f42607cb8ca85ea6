"""The commands of this package: `python main.py gate` (the default), `gate-fidelity` and `gate-bench`."""

from helpers.gate.study.benchmark import GateBenchmark, run_gate_benchmark
from helpers.gate.study.fidelity import FidelitySettings, report_fidelity
from helpers.gate.study.report import ReportSettings, report_gate
from helpers.models import get_preset, in_folder


class _Unchecked:
    """Options unchecked: what is wrong with them is found, and told in one line, when the command runs."""

    def __post_init__(self):
        pass


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
