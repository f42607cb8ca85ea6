"""Files that appear whole or not at all, results with their provenance, and where they lie. Knows nothing of models.

Work shared by several processes is in `helpers.io.processes`, to be imported by that name: it loads accelerate.
"""

from helpers.io.atomic import atomic_files, atomic_path
from helpers.io.paths import ROOT, relative_to_root, results_root
from helpers.io.provenance import environment_table, peak_memory_bytes, provenance
from helpers.io.results import read_keyed, read_result, require, write_filled, write_json, write_keyed, write_table

__all__ = [
    "ROOT", "atomic_files", "atomic_path", "environment_table", "peak_memory_bytes", "provenance", "read_keyed",
    "read_result", "relative_to_root", "require", "results_root", "write_filled", "write_json", "write_keyed",
    "write_table",
]  # fmt: skip
