"""What belongs to training and what to testing: the one rule that every loader of texts and items goes through.

A file or data set of the split that is asked for is read whole. Where training and testing have to share a file, the
records' own `split` fields decide if they name two or more; else it is cut in two, in file order, and never within an
article, a story or an item: the first part is for training ("train"), the second for testing (any other split), and
what stands in both is left to testing.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from helpers.models.presets import uses_of
from helpers.models.text_files import TEXT_FILES, find_file, split_folder

T = TypeVar("T")
TRAINING = "train"
OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}


class Part(list[T]):
    """Texts or items of one split: `split` says in words how they were chosen, `schema` what items are read as."""

    def __init__(self, units: Sequence[T] = (), split: str = "", schema: str = ""):
        super().__init__(units)
        self.split, self.schema = split, schema


@dataclass(frozen=True)
class Place:
    """Where a split is read: the file `path`, or the hub (None)."""

    path: Path | None
    split: str | None  # that is asked for; None: all that a file holds
    shared: bool = False  # by training and testing
    named: bool = False  # by the user, not found in a folder of texts


def locate(source: str | Path, split: str | None, set_split: str) -> Place:
    """The file that `source` is, or the one that it stands for in a folder of texts, else the hub.

    Without `split` a file that the user names is read whole, and `set_split` of a data set. Raises `ValueError` that
    says what is missing in the folder and what needs it.
    """
    if Path(source).is_file():
        return Place(Path(source), split, shared=True, named=True)
    split = split or set_split
    if not (found := split_folder(str(source))):
        return Place(None, split)
    folder, name = found
    if not (file := find_file(folder, name, split)):
        names = ", ".join(file for files in TEXT_FILES[name].values() for file in files)
        uses = [f"the {field} texts of preset {', '.join(presets)}" for field, presets in uses_of(name).items()]
        needed = "; ".join(uses) or "asked for"
        raise ValueError(f"TEXTS_DIR={folder}: found none of {names}, which {name} is read from ({needed})")
    path, shared = file
    return Place(path, split, shared)


def split_holdout(stories: Sequence[T], holdout: float = 0.1) -> tuple[Sequence[T], Sequence[T]]:
    """The first `1 - holdout` and the last `holdout` share of the stories, in file order."""
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must lie between 0 and 1, got {holdout}")
    if len(stories) < 2:
        raise ValueError(f"{len(stories)} text(s) cannot be split in two")
    cut = min(max(1, round(len(stories) * (1 - holdout))), len(stories) - 1)
    return stories[:cut], stories[cut:]


def choose(
    units: list[T],
    place: Place,
    unit: str,
    own: Sequence[str | None] = (),
    holdout: float = 0.5,
    cut: bool = True,
    content: Callable[[T], Hashable] = lambda unit: unit,
) -> Part[T]:
    """The units that belong to the split of `place`, of all that its file holds; all of them where it names none.

    `own` are the splits that the records themselves name, `holdout` is the share that testing gets where the file is
    cut. Without `cut`, a file that the user named is not. `content` is that by which two units are the same. Raises
    `ValueError` where nothing is left or to be cut.
    """
    name, count, split = place.path.name, len(units), place.split
    if split is None or not place.shared:
        return Part(units, f"all {count} of {name}")
    if place.named and len(set(own)) > 1:
        wanted = OTHER_NAMES.get(split, split)
        # One that names none goes to training: in both parts it could not be.
        chosen = [x for x, of in zip(units, own, strict=True) if OTHER_NAMES.get(of, of or TRAINING) == wanted]
        if not chosen:
            raise ValueError(f"{name}: holds no items of split {split!r}")
        return Part(chosen, f"by the split that each record names, {len(chosen)} of {count} in {name}")
    if place.named and not cut:
        return Part(units, f"all {count} of {name}")
    if count < 2:
        raise ValueError(
            f"{name}: {count} {unit} cannot be split in two, for training and for testing (texts end at "
            "<|endoftext|>, else at ' = Title = ' headings, else at blank lines)"
        )
    first, last = split_holdout(units, holdout)
    if split != TRAINING:
        return Part(last, f"by {unit}, the last {len(last)} of {count} in {name}")
    tested = set(map(content, last))
    chosen = [x for x in first if content(x) not in tested]
    if not chosen:
        raise ValueError(f"{name}: every {unit} of its training part stands in its testing part too")
    less = f", less {len(first) - len(chosen)} that testing reads too" if len(chosen) < len(first) else ""
    return Part(chosen, f"by {unit}, the first {len(first)} of {count} in {name}{less}")
