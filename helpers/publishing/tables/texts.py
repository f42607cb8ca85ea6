"""The files that stand in for the hub's data sets, as `helpers.models.TEXT_FILES` lists them."""

import pandas as pd

from helpers.models import TEXT_FILES
from helpers.models.presets import uses_of
from helpers.publishing.tables.layout import markdown


def text_files_table() -> str:
    """For each data set and split the names that are looked for, and what presets read it for."""
    rows = []
    for name, splits in TEXT_FILES.items():
        files = {split: ", ".join(f"`{file}`" for file in files) for split, files in splits.items()}
        rows.append({"data set": f"`{name}`", "read for": ", ".join(sorted(uses_of(name))), **files})
    return markdown(pd.DataFrame(rows).fillna(""))
