"""Print the coverage of each module, and fail where the whole is below 90% of lines or a file below 80%.

python -m pytest --cov --cov-report=
python tests/check_coverage.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

WHOLE, EACH = 90, 80  # percent of lines


def shortfalls(report: dict) -> list[str]:
    """What is below its floor, in a report of `coverage json`."""
    whole = report["totals"]["percent_covered"]
    found = [f"all modules together: {whole:.1f}%, below {WHOLE}%"] if whole < WHOLE else []
    for name, entry in report["files"].items():
        share = entry["summary"]["percent_covered"]
        if share < EACH:
            found.append(f"{name}: {share:.1f}%, below {EACH}%")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "--fail-under=0", "-o", str(path)]
        subprocess.run(command, check=True)
        report = json.loads(path.read_text())
    for name, entry in sorted(report["files"].items(), key=lambda item: item[1]["summary"]["percent_covered"]):
        print(f"{entry['summary']['percent_covered']:6.1f}%  {name}")
    print(f"{report['totals']['percent_covered']:6.1f}%  all modules")
    found = shortfalls(report)
    print("\n".join(found), file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
