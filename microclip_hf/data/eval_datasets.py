"""Images to evaluate on: those that can be read, with labels numbered like the classes."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset
from transformers.utils.logging import tqdm

from ..images import UNREADABLE, decode, to_rgb
from .image_columns import as_images, describe_unreadable, stored_images, undecoded
from .labels import align_labels


# Images that are in memory at once while they are tried.
BATCH_SIZE = 64


class EvalDatasets:
    """Prepares data sets for evaluation; each is read once to find the images that can't be, of which `warn` tells.

    Labels are numbered like `class_names`; with `None` they are taken as they are.
    """

    def __init__(self, class_names: Sequence[str] | None, warn: bool = True, progress: bool = True) -> None:
        self.class_names = class_names
        self.warn = warn
        self.progress = progress
        self._readable: dict[str, Dataset] = {}  # by the fingerprint of a data set, or of what is left of it

    def align(self, dataset: Any) -> Any:
        """Objects of `datasets`, or a dictionary of such, with labels numbered like the classes; nothing is read."""
        if isinstance(dataset, dict):
            return {name: self.align(part) for name, part in dataset.items()}
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        dataset = undecoded(as_images(dataset))
        return dataset if self.class_names is None else align_labels(dataset, self.class_names)

    def prepare(self, dataset: Any) -> Any:
        """[`align`], and only images that can be read; an error if labels are no classes, or no image can be read."""
        if isinstance(dataset, dict):
            return {name: self.prepare(part) for name, part in dataset.items()}
        dataset = self.align(dataset)
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        if not isinstance((dataset.features or {}).get("image"), Image):
            return dataset
        if isinstance(dataset, IterableDataset):
            # Not `filter`, which the oldest versions of `datasets` can't after a cast.
            options = {"batched": True, "batch_size": BATCH_SIZE, "features": dataset.features}
            return dataset.map(self._keep_readable, **options)
        if dataset._fingerprint not in self._readable:
            readable = self._select_readable(dataset)
            # The outcome too: prepared again, it is not read again.
            self._readable |= {dataset._fingerprint: readable, readable._fingerprint: readable}
        return self._readable[dataset._fingerprint]

    def _select_readable(self, dataset: Dataset) -> Dataset:
        images = stored_images(dataset)
        problems = []
        progress = {"desc": "Test images", "total": len(images), "unit": "image", "disable": not self.progress}
        with ThreadPoolExecutor() as pool, tqdm(**progress) as bar:
            for batch in images.iter(BATCH_SIZE):
                problems += pool.map(_find_problem, batch["image"])
                bar.update(len(batch["image"]))
        unreadable = torch.tensor([problem is not None for problem in problems], dtype=torch.bool)
        if not unreadable.any():
            return dataset
        summary = describe_unreadable(dataset, unreadable)
        if unreadable.all():
            raise ValueError(f"{summary}, so nothing can be measured.")
        if self.warn:
            warnings.warn(f"{summary} and are left out.", stacklevel=2)
        return dataset.select((~unreadable).nonzero().flatten().tolist())

    def _keep_readable(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        problems = [_find_problem(image) for image in examples["image"]]
        for problem in problems:
            if problem is not None and self.warn:
                warnings.warn(f"An image can't be read and is left out: {problem}", stacklevel=2)
        kept = [index for index, problem in enumerate(problems) if problem is None]
        return {name: [values[index] for index in kept] for name, values in examples.items()}


def _find_problem(image: Any) -> Exception | None:
    try:
        to_rgb(decode(image))
    except UNREADABLE as error:
        return error
    return None
