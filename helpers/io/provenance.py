"""Where a result comes from: versions, device, date, and the memory a run took."""

import os
import platform
import re
import sys
from datetime import date
from pathlib import Path

from helpers.io.paths import FAST


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had."""
    try:  # Linux: ru_maxrss would count what the parent held when it started this process
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):  # no such file, or no such line in it
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def provenance(**extra: object) -> dict[str, object]:
    """What a result file carries beside its numbers: versions, device, date and the caller's own entries."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        **({"fast": True} if os.environ.get(FAST) else {}),
        **extra,
    }


def environment_table(**extra: object):
    """`provenance` as a table for the head of a notebook, without the date, which would change at every run."""
    import pandas as pd

    entries = {name: str(value) for name, value in provenance(**extra).items() if name != "date"}
    return pd.DataFrame({"value": entries}).rename_axis("environment")
