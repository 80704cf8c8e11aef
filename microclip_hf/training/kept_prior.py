"""The multi-view prior of every image in a file, for `prior_refresh` of "epoch" and "never"."""

import contextlib
import json
import os
import re
import shutil
from typing import Any

import numpy as np


class KeptPrior:
    """Scores of the frozen head by image index, float32 in a memory-mapped `.npy` file of each epoch.

    Several processes may write the same rows with the same numbers, and any number may read; a file has its name once
    it is complete.

    Args:
        folder (`str`): where the files are.
        shape (`tuple[int, int]`): images and classes.
        settings (`dict`): what else the scores depend on; those of other settings are refused.
    """

    def __init__(self, folder: str, shape: tuple[int, int], settings: dict[str, Any]) -> None:
        self.folder, self.shape = folder, shape
        self._facts = json.dumps({"images": shape[0], "classes": shape[1], **settings})
        self._facts_file, self._incomplete = (os.path.join(folder, name) for name in ("facts.json", "incomplete.npy"))

    def path(self, epoch: int) -> str:
        """The file of this epoch."""
        return os.path.join(self.folder, f"epoch-{epoch}.npy")

    def exists(self, epoch: int) -> bool:
        """Whether the scores of this epoch are complete.

        Raises:
            ValueError: if they are of other images, classes or settings.
        """
        if not os.path.exists(self.path(epoch)):
            return False
        with open(self._facts_file, encoding="utf-8") as file:
            found = file.read()
        if found != self._facts:
            raise ValueError(
                f"{self.folder} holds a prior of {found}; this run has {self._facts}. Resume with what the run began "
                "with, or remove that folder to compute the prior anew."
            )
        return True

    def create(self) -> None:
        """An empty file to write to.

        Raises:
            OSError: if the disk has no room for it (writing to the map would kill the process).
        """
        os.makedirs(self.folder, exist_ok=True)
        needed, free = 4 * self.shape[0] * self.shape[1], shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The prior of {self.shape[0]} images and {self.shape[1]} classes needs {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free. Make room, or use prior_refresh='step'."
            )
        rows = np.lib.format.open_memmap(self._incomplete, "w+", np.float32, self.shape)
        rows[:] = np.nan
        with open(self._facts_file, "w", encoding="utf-8") as file:
            file.write(self._facts)

    def write(self, index: np.ndarray, scores: np.ndarray) -> None:
        """Scores `(batch_size, num_labels)` of these images; where none are written NaN stays."""
        rows = np.load(self._incomplete, mmap_mode="r+")
        rows[index] = scores

    def read(self, epoch: int, index: int) -> np.ndarray:
        """Scores of one image, `(num_labels,)`."""
        return np.array(np.load(self.path(epoch), mmap_mode="r")[index])

    def finish(self, epoch: int) -> None:
        """Give the file its name; files of epochs before the last one, which no checkpoint needs, are removed."""
        if os.path.exists(self._incomplete):
            os.replace(self._incomplete, self.path(epoch))
        for other in self._epochs():
            if other < epoch - 1:
                os.remove(self.path(other))

    def remove(self, from_epoch: int) -> None:
        """Forget the scores of this epoch and later ones, and unfinished ones, of an earlier life of a run."""
        for epoch in self._epochs():
            if epoch >= from_epoch:
                os.remove(self.path(epoch))
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._incomplete)

    def _epochs(self) -> list[int]:
        """The epochs that have a file."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return [int(match[1]) for name in names if (match := re.fullmatch(r"epoch-(\d+)\.npy", name))]
