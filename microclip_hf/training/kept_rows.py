"""Numbers of every image in a file, computed in one pass: the multi-view prior's scores, or features."""

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


COMPLETE_FILE = "complete.npy"


class KeptRows:
    """Rows by image index in a memory-mapped `.npy` file, of `shape` images and columns.

    Several processes may write the same rows with the same numbers, and any number may read; the file has its name
    once it is complete, and one that isn't is gone on with. `facts` are what the numbers depend on; those of other
    facts are refused.
    """

    def __init__(
        self, folder: str, shape: tuple[int, int], facts: dict[str, Any], dtype: type[np.floating] = np.float32
    ) -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = dtype
        self._facts = json.dumps(facts)
        self._facts_file = os.path.join(folder, "facts.json")
        self._file = os.path.join(folder, COMPLETE_FILE)
        self._incomplete = os.path.join(folder, "incomplete.npy")

    def exists(self) -> bool:
        """Whether the rows are complete; an error where they are of other facts."""
        if not os.path.exists(self._file):
            return False
        facts = self._read_facts()
        if facts != self._facts:
            raise ValueError(
                f"{self.folder} holds numbers of {facts}; this run has {self._facts}. Resume with what the run began "
                "with, or remove that folder to compute them anew."
            )
        return True

    def create(self) -> None:
        """A file to write to; an error if the disk has no room (writing to the map would kill the process)."""
        os.makedirs(self.folder, exist_ok=True)
        if os.path.exists(self._incomplete) and self._read_facts() == self._facts:
            return
        needed = np.dtype(self.dtype).itemsize * self.shape[0] * self.shape[1]
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The numbers of {self.shape[0]} images, {self.shape[1]} each, need {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free. Make room on that disk."
            )
        rows = np.lib.format.open_memmap(self._incomplete, "w+", self.dtype, self.shape)
        rows[:] = np.nan
        write_whole(self._facts_file, self._facts)

    def write(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Rows `(batch_size, columns)` of these images; where none are written NaN stays."""
        np.load(self._incomplete, mmap_mode="r+")[index] = rows

    def read(self, index: int | slice) -> np.ndarray:
        """The row of one image, `(columns,)`, or those of several."""
        return np.array(np.load(self._file, mmap_mode="r")[index])

    def find_missing(self) -> list[int]:
        """Images whose rows aren't written yet."""
        return _find_empty(self._incomplete)

    def find_unreadable(self) -> list[int]:
        """Images that have no row, though all were tried."""
        return _find_empty(self._file)

    def finish(self) -> None:
        """Give the file its name."""
        if os.path.exists(self._incomplete):
            os.replace(self._incomplete, self._file)

    def remove(self) -> None:
        """Forget the rows of an earlier run."""
        for file in (self._facts_file, self._file, self._incomplete):
            with contextlib.suppress(FileNotFoundError):
                os.remove(file)

    def remove_others(self) -> None:
        """Forget rows of other facts."""
        if self._read_facts() != self._facts:
            self.remove()

    def fill(
        self,
        loader: Callable[[list[int]], Iterable[dict[str, torch.Tensor]]],
        compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        accelerator: Accelerator,
    ) -> None:
        """Write what is computed, `(B, columns)`, of batches that hold an `index` and are shared out; every process
        must call it. The `loader` gets the images that are missing. Nothing is done where every disk has all of them.
        """
        exists = torch.tensor(int(self.exists()), device=accelerator.device)
        if accelerator.reduce(exists, "sum") == accelerator.num_processes:
            return
        for has_turn in turns(accelerator):
            if has_turn:
                self.create()
        # Disks may differ, and all must go around as often.
        is_missing = torch.zeros(self.shape[0], dtype=torch.int32, device=accelerator.device)
        is_missing[self.find_missing()] = 1
        missing = accelerator.reduce(is_missing, "sum").nonzero().flatten().tolist()
        for batch in loader(missing) if missing else ():
            index, rows = accelerator.gather((batch["index"], compute(batch)))
            if accelerator.is_local_main_process:
                self.write(index.cpu().numpy(), rows.cpu().numpy())
        for has_turn in turns(accelerator):
            if has_turn:
                self.finish()

    def _read_facts(self) -> str | None:
        with contextlib.suppress(FileNotFoundError), open(self._facts_file, encoding="utf-8") as file:
            return file.read()
        return None


def _find_empty(file: str) -> list[int]:
    return np.flatnonzero(np.isnan(np.load(file, mmap_mode="r")[:, 0])).tolist()
