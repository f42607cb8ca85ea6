"""The project's command line: `python main.py COMMAND --help` shows the options of a command.

Without a command: the report on entropy-gated generation, as `python main.py gate`.
"""

import os
import sys
from importlib import import_module

import tyro

# Each command is a function of its package, and its parameters are the options. Only its module is imported.
COMMANDS = {
    "collect": ("helpers.training.commands:collect", "log features and widths, token by token (Part 1)"),
    "quality": ("helpers.evaluation.commands:quality", "KL and accuracy of fixed widths, block by block"),
    "calibrate-keys": ("helpers.training.commands:calibrate_keys", "measure how keys are best balanced before coding"),
    "train": ("helpers.training.commands:train", "train the controllers of a model (Part 2)"),
    "compare": ("helpers.evaluation.commands:compare", "all policies and baselines on one model (Part 4)"),
    "chat": ("helpers.evaluation.commands:chat", "ten turns of a conversation on one cache, by method"),
    "facts": ("helpers.evaluation.commands:facts", "facts of long texts that a model still finds, by method"),
    "harness": ("helpers.evaluation.harness.command:harness", "tasks of the LM Evaluation Harness, caches committed"),
    "weights": ("helpers.evaluation.commands:weights", "what weights at 8 bits cost and gain on a CPU"),
    "memory": ("helpers.evaluation.commands:memory", "peak, held and live bytes of every kind of cache"),
    "card": ("helpers.publishing.commands:card", "measure the embedded pair again and rewrite its card"),
    "bench": ("helpers.publishing.commands:bench", "kernels and decode steps against the caches of transformers"),
    "gate": ("helpers.gate.study.commands:gate", "compare entropy-gated generation with its baselines (Part 5)"),
    "train-gate": ("helpers.gate.study.commands:train_gate", "train the gate's learned signal on a pair of models"),
    "gate-fidelity": ("helpers.gate.study.commands:gate_fidelity", "what every signal is worth over random calls"),
    "gate-bench": ("helpers.gate.study.commands:gate_bench", "speed of the gate with models of real sizes"),
    "pretrain": ("helpers.training.pretraining:pretrain", "train a story model, as the embedded ones were"),
}
SHARED_COMMANDS = ("collect", "compare", "pretrain")  # whose work `accelerate launch` or `torchrun` can spread
OPTIONS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; what goes wrong is told in one line, `COMMAND: message`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: python main.py [COMMAND] [OPTIONS]\n\n" + __doc__)
        print("\n".join(f"  {name:14} {about}" for name, (_, about) in COMMANDS.items()))
        return 0
    if not arguments or arguments[0].startswith("-"):
        arguments = ["gate", *arguments]
    name, *options = arguments
    if name not in COMMANDS:
        _refuse(f"there is no command {name!r}; choose from {', '.join(COMMANDS)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and name not in SHARED_COMMANDS:
        _refuse(f"{name} runs in one process; several can share collect and compare, and pretrain")
    place, about = COMMANDS[name]
    module, function = place.split(":")
    try:
        command = getattr(import_module(module), function)
        tyro.cli(command, prog=f"main.py {name}", description=about, args=options, config=OPTIONS)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def _refuse(message: str) -> None:
    print(f"main.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
