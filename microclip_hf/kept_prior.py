"""The multi-view prior of every image in a file, for `prior_refresh` of "epoch" and "never"."""

import glob
import os
import shutil

import numpy as np


class KeptPrior:
    """Scores of the frozen head by image index, float32 in a memory-mapped `.npy` file of each epoch.

    Several processes may write the same rows with the same numbers, and any number may read; a file has its name once
    it is complete.

    Args:
        folder (`str`): where the files are.
        num_images (`int`): rows.
        num_labels (`int`): columns.
    """

    def __init__(self, folder: str, num_images: int, num_labels: int) -> None:
        self.folder, self.shape = folder, (num_images, num_labels)
        self._incomplete = os.path.join(folder, "incomplete.npy")

    def path(self, epoch: int) -> str:
        """The file of this epoch."""
        return os.path.join(self.folder, f"epoch-{epoch}.npy")

    def exists(self, epoch: int) -> bool:
        """Whether the scores of this epoch are complete, and of as many images and classes.

        Raises:
            ValueError: if they are of others.
        """
        if not os.path.exists(self.path(epoch)):
            return False
        found = np.load(self.path(epoch), mmap_mode="r").shape
        if found != self.shape:
            raise ValueError(
                f"{self.path(epoch)} holds scores of {found[0]} images and {found[1]} classes; this run has "
                f"{self.shape[0]} and {self.shape[1]}. Resume with the images and class names that the run began with."
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
        np.lib.format.open_memmap(self._incomplete, "w+", np.float32, self.shape).flush()

    def write(self, index: np.ndarray, scores: np.ndarray) -> None:
        """Scores `(batch_size, num_labels)` of these images; the file keeps zeros where none are written."""
        rows = np.load(self._incomplete, mmap_mode="r+")
        rows[index] = scores

    def read(self, epoch: int, index: int) -> np.ndarray:
        """Scores of one image, `(num_labels,)`."""
        return np.array(np.load(self.path(epoch), mmap_mode="r")[index])

    def finish(self, epoch: int) -> None:
        """Give the file its name; files of epochs before the last one, which no checkpoint needs, are removed."""
        if os.path.exists(self._incomplete):
            os.replace(self._incomplete, self.path(epoch))
        for path in glob.glob(self.path("*")):
            if path not in (self.path(epoch), self.path(epoch - 1)):
                os.remove(path)

    def clear(self) -> None:
        """Forget all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
