"""The options that several commands share: a preset, and what takes the place of its model and texts."""

from dataclasses import dataclass

from helpers.models.presets import Preset, get_preset
from helpers.models.text_files import in_folder


@dataclass(frozen=True)
class Sources:
    """What is read and where the result goes; what is left out comes from the preset."""

    preset: str | None = None  # embedded (default), smollm2, smollm or llama; also the variable PRESET
    model: str | None = None  # folder, hub name, GGUF file or pypi:NAME instead of the preset's model
    texts: str | None = None  # file or hub name instead of the preset's texts
    texts_dir: str | None = None  # folder of files in place of the hub's texts; also the variable TEXTS_DIR
    out: str | None = None  # result file or folder instead of the preset's
    seed: int = 0

    def get_preset(self) -> Preset:
        """The preset that is meant, its texts in the folder of texts if there is one."""
        return get_preset(self.preset, self.texts_dir)

    def find(self, source: str | None, default: str) -> str:
        """The texts that were asked for, else the preset's: a file, a hub name, or that name in the folder of texts."""
        return in_folder(source or default, self.texts_dir)
