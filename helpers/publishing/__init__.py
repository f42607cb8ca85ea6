"""What readers see: figures from plain tables, widgets, executed notebooks, and the documents' tables.

`plots` has every figure, `explorers` the widgets of JupyterLab, `tables` what stands in the documents (`blocks` writes
it there), `command` runs the notebooks. Nothing is measured here: tables come from the packages before this one.
"""

from helpers.publishing import explorers, plots
from helpers.publishing.blocks import stale_blocks, write_documents
from helpers.publishing.execution import publish, publish_fast
from helpers.publishing.plots import save_figure
from helpers.publishing.tidying import faults, tidy

__all__ = [
    "explorers",
    "faults",
    "plots",
    "publish",
    "publish_fast",
    "save_figure",
    "stale_blocks",
    "tidy",
    "write_documents",
]
