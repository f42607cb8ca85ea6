"""The list of public names in `helpers`, and the size and coverage that the project asks of its modules."""

import importlib
import re
from pathlib import Path

import pytest

import helpers

FOLDER = Path(helpers.__file__).parent
LISTED = {
    module: re.findall(r"`(\w+)`", names) for module, names in re.findall(r"^\* `(\w+)`: (.*)$", helpers.__doc__, re.M)
}
MODULES = {path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"}
MODULES |= {path.parent.name for path in FOLDER.glob("*/__init__.py")}


def test_every_module_is_listed_once():
    assert set(LISTED) == MODULES
    assert helpers.__doc__.count("\n* `") == len(MODULES)


@pytest.mark.parametrize("module", LISTED)
def test_listed_names_exist_and_are_explained(module):
    loaded = importlib.import_module(f"helpers.{module}")
    assert loaded.__doc__
    for name in LISTED[module]:
        thing = getattr(loaded, name)
        assert not callable(thing) or thing.__doc__, name
