"""The doors of the packages: what each exports is there and explained, and the map of `helpers` names them in order."""

import importlib
import re
from pathlib import Path

import pytest

import helpers

FOLDER = Path(helpers.__file__).parent
ORDER = ["io", "cache", "models", "policies", "evaluation", "training", "gate", "publishing"]


def test_the_map_names_the_packages_in_the_order_of_imports():
    assert re.findall(r"^\* `(\w+)`: ", helpers.__doc__, re.M) == ORDER
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(ORDER)


def test_nothing_else_stands_at_the_top():
    assert [path.name for path in FOLDER.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("package", [*ORDER, "gate.study"])
def test_public_names_exist_and_are_explained(package):
    loaded = importlib.import_module(f"helpers.{package}")
    assert len(loaded.__doc__.strip().splitlines()) >= 2
    assert loaded.__all__
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        assert not callable(thing) or thing.__doc__, name


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_file_says_what_it_holds(path):
    assert path.read_text(encoding="utf-8").startswith('"""')
