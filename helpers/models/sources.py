"""The options that several commands share: a preset, and what takes the place of its model and texts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sources:
    """What is read and where the result goes; what is left out comes from the preset."""

    preset: str | None = None  # embedded (default), smollm or llama; also the variable PRESET
    model: str | None = None  # folder or hub name instead of the preset's model
    texts: str | None = None  # file or hub name instead of the preset's texts
    out: str | None = None  # result file or folder instead of the preset's
    seed: int = 0
