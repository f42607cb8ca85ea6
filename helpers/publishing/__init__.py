"""What readers see: figures from plain tables, widgets, executed notebooks, and the tables of the documents.

`plots` has every figure, `explorers` the widgets of JupyterLab, `skip_rest` ends a notebook early. What notebooks do
not need is not imported here: `tables` (what stands in the documents), `blocks` (writes it there), `execution` and
`tidying` (run notebooks), `command` (`python -m helpers.publishing`). Nothing is measured here: tables come from the
packages before this one.
"""

from helpers.publishing import explorers, plots
from helpers.publishing.stopping import skip_rest

__all__ = ["explorers", "plots", "skip_rest"]
