"""The multi-view prior of every image in a file, computed once before training, for `prior_refresh="never"`."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..files import write_whole
from .saving import turns


# In the output folder.
PRIOR_DIR = "_prior"
# As earlier versions called it, whose runs go on.
PRIOR_FILE = "epoch-0.npy"


class KeptPrior:
    """Scores of the frozen head by image index, float32 in a memory-mapped `.npy` file, of `shape` images and classes.

    Several processes may write the same rows with the same numbers, and any number may read; the file has its name
    once it is complete. `settings` are what else the scores depend on; those of others are refused.
    """

    def __init__(self, folder: str, shape: tuple[int, int], settings: dict[str, Any]) -> None:
        self.folder = folder
        self.shape = shape
        self._facts = json.dumps({"images": shape[0], "classes": shape[1], **settings})
        self._facts_file = os.path.join(folder, "facts.json")
        self._file = os.path.join(folder, PRIOR_FILE)
        self._incomplete = os.path.join(folder, "incomplete.npy")

    def exists(self) -> bool:
        """Whether the scores are complete; an error where they are of other images, classes or settings."""
        if not os.path.exists(self._file):
            return False
        with open(self._facts_file, encoding="utf-8") as file:
            facts = file.read()
        if facts != self._facts:
            raise ValueError(
                f"{self.folder} holds a prior of {facts}; this run has {self._facts}. Resume with what the run began "
                "with, or remove that folder to compute the prior anew."
            )
        return True

    def create(self) -> None:
        """An empty file to write to; an error if the disk has no room (writing to the map would kill the process)."""
        os.makedirs(self.folder, exist_ok=True)
        needed = 4 * self.shape[0] * self.shape[1]
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The prior of {self.shape[0]} images and {self.shape[1]} classes needs {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free. Make room, or use prior_refresh='step'."
            )
        rows = np.lib.format.open_memmap(self._incomplete, "w+", np.float32, self.shape)
        rows[:] = np.nan
        write_whole(self._facts_file, self._facts)

    def write(self, index: np.ndarray, scores: np.ndarray) -> None:
        """Scores `(batch_size, num_classes)` of these images; where none are written NaN stays."""
        rows = np.load(self._incomplete, mmap_mode="r+")
        rows[index] = scores

    def read(self, index: int) -> np.ndarray:
        """Scores of one image, `(num_classes,)`."""
        return np.array(np.load(self._file, mmap_mode="r")[index])

    def finish(self) -> None:
        """Give the file its name."""
        if os.path.exists(self._incomplete):
            os.replace(self._incomplete, self._file)

    def remove(self) -> None:
        """Forget the scores of an earlier run."""
        for file in (self._file, self._incomplete):
            with contextlib.suppress(FileNotFoundError):
                os.remove(file)

    def fill(
        self,
        batches: Iterable[dict[str, torch.Tensor]],
        score: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        accelerator: Accelerator,
    ) -> None:
        """Write the scores `(B, C)` of batches that hold an `index` and are shared out; every process must call it."""
        for has_turn in turns(accelerator):
            if has_turn:
                self.create()
        for batch in batches:
            index, scores = accelerator.gather((batch["index"], score(batch)))
            if accelerator.is_local_main_process:
                self.write(index.cpu().numpy(), scores.cpu().numpy())
        for has_turn in turns(accelerator):
            if has_turn:
                self.finish()
