"""Ending a notebook early without an error: cells after a reason are passed over, in JupyterLab and on paper alike."""

from IPython import get_ipython

RUNS_ANYHOW = "# runs in any case"  # first line of a cell that is not passed over


def skip_rest(reason: str) -> None:
    """Print `reason`; where there is one, every later cell of this notebook does nothing until the kernel restarts.

    Without a reason nothing happens.
    """
    if reason:
        print(f"{reason}. The cells below are skipped; restart the kernel to run them on another preset.")
        get_ipython().input_transformers_cleanup.append(
            lambda lines: lines if lines and lines[0].rstrip() == RUNS_ANYHOW else []
        )
