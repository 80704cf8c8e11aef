"""Views of images as training data: data sets, streams and batches. Images that can't be read are left out."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import BaseImageProcessor

from ..data.image_columns import as_images, describe_unreadable, undecoded
from ..data.labels import align_or_leave_out
from ..images import UNREADABLE, cut_strip, decode, to_rgb
from ..passes.photo_batches import RowBatch
from .kept_rows import KeptRows
from .views import make_views


VIEW_NAMES = ("weak", "strong", "crops")
# A label that isn't known; cross-entropy ignores it.
UNKNOWN = -100
# A stream's share of unreadable images is judged as if at least so many had been seen.
LEAST_SEEN = 1000


@dataclass(frozen=True)
class ViewSettings:
    """How views are made (see [`make_views`]), and how many images may be unreadable."""

    size: int
    num_crops: int
    crop_ratio: Sequence[float]
    seed: int  # with the epoch and the index of an image it seeds its views
    max_corrupt_share: float = 0.0  # of unreadable images, above which they are an error
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def make_example(self, example: dict[str, Any], epoch: int, index: int) -> dict[str, Any]:
        """The views of one image, with its `index`, and its `label` as `labels`."""
        rng = np.random.default_rng((self.seed, epoch, index))
        image = decode(example["image"], lazy=True)
        may_draft = isinstance(example["image"], dict)  # not an image that others hold too
        views = make_views(image, self.size, self.num_crops, self.crop_ratio, rng, may_draft, self.resample)
        labels = {"labels": example["label"]} if "label" in example else {}
        return {**views, **labels, "index": index}

    def check_stream(self, num_unreadable: int, num_seen: int, cause: Exception | str | None = None) -> None:
        """Raise the error where too many of a stream's images, as far as they were seen, are unreadable."""
        if num_unreadable > self.max_corrupt_share * max(num_seen, LEAST_SEEN):
            problem = f"{num_unreadable} of the first {num_seen} images of the stream can't be read"
            raise self.error(problem, cause)

    def error(self, problem: str, cause: Exception | str | None) -> ValueError:
        """What is raised when too many images are unreadable."""
        reason = "" if cause is None else f", the last of them because of: {cause}"
        return ValueError(
            f"{problem}{reason}. Remove or repair them, or raise max_corrupt_share ({self.max_corrupt_share})."
        )


class ViewDataset(torch.utils.data.Dataset):
    """Images of a map-style data set as views; the same (seed, epoch, index) gives the same views in any process.

    Items are dictionaries with an `image`, PIL or undecoded, and perhaps a `label`, which is passed on as `labels`. In
    place of an unreadable image comes the next one that can be read; more than the settings permit are an error.
    """

    def __init__(self, dataset: Any, settings: ViewSettings) -> None:
        self.dataset = dataset
        self.settings = settings
        self.kept_prior: KeptRows | None = None  # once complete, its `prior_scores` come along in place of crops
        # Shared memory: workers that outlive an epoch hold a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # (num_images,), as found so far
        self._num_told = 0
        self._limit = min(math.ceil(settings.max_corrupt_share * len(dataset)), len(dataset) - 1)

    def set_epoch(self, epoch: int) -> None:
        """Views of the next pass, in every worker; the Trainer calls it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):  # by this a loop over the data set ends
            raise IndexError(f"There are {len(self)} images; got the index {index}.")
        # From the last image it goes around to the first: what stands in is the same whatever was read before.
        for position in (*range(index, len(self)), *range(index)):
            if self.unreadable[position]:
                continue
            try:
                return self.make_example(position)
            except UNREADABLE as error:
                self.unreadable[position] = True
                self._check_limit(error)
        raise AssertionError("the limit leaves at least one readable image")

    def gather_unreadable(self, accelerator: Accelerator) -> None:
        """Bring `unreadable` together over all processes, which must all call it, and tell of images that are new; an
        error if they are too many together.
        """
        unreadable = self.unreadable.to(accelerator.device, torch.int32)
        self.unreadable.copy_(accelerator.reduce(unreadable, "sum").bool())
        self._check_limit()
        num_unreadable = int(self.unreadable.sum())
        if num_unreadable > self._num_told and accelerator.is_main_process:
            problem = describe_unreadable(self.dataset, self.unreadable)
            warnings.warn(f"{problem}; others stood in for them.", stacklevel=2)
        self._num_told = num_unreadable

    def note(self, batch: RowBatch) -> None:
        """Remember which images of a pass can't be read; an error if they are too many."""
        problems = {batch.first + row: problem for row, problem in enumerate(batch.problems) if problem is not None}
        if problems:
            self.unreadable[list(problems)] = True
            self._check_limit(list(problems.values())[-1])

    def tell_unreadable(self, kept: KeptRows, accelerator: Accelerator) -> None:
        """[`gather_unreadable`], with the images that have no row."""
        for index in kept.find_unreadable():
            self.unreadable[index] = True
        self.gather_unreadable(accelerator)

    def make_example(self, position: int) -> dict[str, Any]:
        """The views of this very image, or one of the errors `UNREADABLE`."""
        if self.kept_prior is None:
            return self.settings.make_example(self.dataset[position], self._epoch.item(), position)
        scores = self.kept_prior.read(position)
        if np.isnan(scores).any():
            raise ValueError("the image couldn't be read when the prior was computed")  # so it is unreadable here too
        settings = replace(self.settings, num_crops=0)
        views = settings.make_example(self.dataset[position], self._epoch.item(), position)
        return {**views, "prior_scores": scores}

    def _check_limit(self, cause: Exception | str | None = None) -> None:
        """Raise the error where more images are `unreadable` than the settings permit."""
        if self.unreadable.sum() > self._limit:
            problem = f"At least {describe_unreadable(self.dataset, self.unreadable)}"
            raise self.settings.error(problem, cause)


class ViewStream(torch.utils.data.IterableDataset):
    """Images of a stream as views, endlessly: it is read again from its start as often as steps ask for.

    Views are seeded by the place in the stream; with several workers, each of which reads shards of its own, places
    are counted in turns. Examples have no `index`: a shuffled stream has another image in a place at each pass.
    Unreadable images are passed over; more than the settings permit are an error.
    """

    def __init__(self, dataset: Any, settings: ViewSettings) -> None:
        self.dataset = dataset
        self.settings = settings

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        num_seen = 0
        num_unreadable = 0
        for epoch in itertools.count():
            if isinstance(self.dataset, datasets.IterableDataset):
                self.dataset.set_epoch(epoch)
            num_before = num_seen
            for index, example in zip(itertools.count(first, stride), self.dataset):
                num_seen += 1
                try:
                    views = self.settings.make_example(example, epoch, index)
                except UNREADABLE as error:
                    num_unreadable += 1
                    self.settings.check_stream(num_unreadable, num_seen, error)
                else:
                    del views["index"]
                    yield views
            if num_seen == num_before:
                return  # a worker without any shard

    def tell_unreadable(self, kept: KeptRows, accelerator: Accelerator) -> None:
        """Tell how many images of a pass have no row; an error if they are too many."""
        num_unreadable = sum(map(len, kept.find_unreadable()))
        self.settings.check_stream(num_unreadable, kept.num_rows)
        if num_unreadable > 0 and accelerator.is_main_process:
            problem = f"{num_unreadable} of {kept.num_rows} images of the stream can't be read"
            warnings.warn(f"{problem}; they were passed over.", stacklevel=2)


class StreamNotes:
    """What a pass over a stream has met: images, and those that can't be read; too many of these are an error."""

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings
        self.num_seen = 0
        self.num_unreadable = 0

    def begin(self, num_rows: int) -> None:
        """So many images were read before, all of them well."""
        self.num_seen = num_rows
        self.num_unreadable = 0

    def note(self, batch: RowBatch) -> None:
        """Count a batch in."""
        problems = [problem for problem in batch.problems if problem is not None]
        self.num_seen += len(batch.problems)
        self.num_unreadable += len(problems)
        if problems:
            self.settings.check_stream(self.num_unreadable, self.num_seen, problems[-1])


def as_views(dataset: Any, settings: ViewSettings, class_names: Sequence[str] | None) -> Any:
    """Training images as [`ViewDataset`] or [`ViewStream`]; what holds views stays as it is, other items are an error.

    Labels of `datasets`, to measure by, are numbered like `class_names`, or where these are `None` taken as they are;
    those that aren't classes are left out.
    """
    is_stream = isinstance(dataset, (datasets.IterableDataset, torch.utils.data.IterableDataset))
    dataset = undecoded(as_images(dataset))
    if _holds_views(first_example(dataset)):
        return dataset
    if class_names is not None and isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        dataset = align_or_leave_out(dataset, class_names, "train_dataset")
    return ViewStream(dataset, settings) if is_stream else ViewDataset(dataset, settings)


def first_example(dataset: Any) -> Any:
    """The first item of a data set or a stream that can be read; an error if none of the first `LEAST_SEEN` can."""
    if not hasattr(dataset, "__len__"):
        example = next(filter(_has_image, itertools.islice(dataset, LEAST_SEEN)), None)
        if example is None:
            raise ValueError("train_dataset is empty, or holds no images; pass images to adapt to.")
        return example
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty; pass images to adapt to.")
    num_tried = min(len(dataset), LEAST_SEEN)
    for index in range(num_tried):
        with contextlib.suppress(*UNREADABLE):
            example = dataset[index]
            if _has_image(example):
                return example
    raise ValueError(f"None of the first {num_tried} images can be read; pass images that Pillow opens.")


def _has_image(example: Any) -> bool:
    """Whether it isn't one of a table whose image is missing."""
    return not isinstance(example, dict) or "image" not in example or example["image"] is not None


def _holds_views(example: Any) -> bool:
    """Whether a training example holds views; otherwise it holds an image, or is an error."""
    if not isinstance(example, dict):
        raise _wrong_items(example)
    if "weak" in example and "strong" in example:
        return True
    image = example.get("image")
    if isinstance(image, Image.Image) or (isinstance(image, dict) and {"path", "bytes"} <= set(image)):
        return False
    raise _wrong_items({name: type(value).__name__ for name, value in example.items()})


def _wrong_items(content: Any) -> ValueError:
    return ValueError(
        f"The items of train_dataset hold {content}; expected a PIL image under 'image' (rename the column, and "
        "cast_column('image', datasets.Image()) where it holds paths), or the views 'weak', 'strong' and 'crops'."
    )


class ViewCollator:
    """Batches of views to train on, and batches of images to evaluate on, which the image processor prepares."""

    def __init__(self, image_processor: BaseImageProcessor | None = None) -> None:
        self.image_processor = image_processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of dictionaries with the views of [`make_views`] (and `prior_scores` in place of crops), with
        `pixel_values`, or with an `image`, PIL or undecoded; what has none of these is an error.

        `index` comes along where every example has one, `labels` or `label` where any has; what isn't an index of a
        class, such as -1 or None, becomes -100.

        Returns:
            `weak` and `strong` (B, 3, S, S) and `crops` (B, K, 3, S, S), uint8, and `prior_scores` (B, C) as far as
            there are any; or `pixel_values` (B, 3, S, S).
        """
        first = examples[0]
        if "weak" in first:
            batch = {name: _stack(examples, name) for name in (*VIEW_NAMES, "prior_scores") if name in first}
        elif "pixel_values" in first:
            batch = {"pixel_values": _stack(examples, "pixel_values")}
        elif "image" in first and self.image_processor is not None:
            images = [cut_strip(_to_rgb(example["image"])) for example in examples]
            batch = dict(self.image_processor(images, return_tensors="pt"))
        else:
            raise ValueError(
                f"An example holds {', '.join(map(repr, first))}; expected 'image' (with an image processor), "
                "'pixel_values', or the views 'weak', 'strong' and 'crops'."
            )
        if all("index" in example for example in examples):
            batch["index"] = torch.tensor([int(example["index"]) for example in examples])
        if any("label" in example or "labels" in example for example in examples):
            labels = [example.get("labels", example.get("label")) for example in examples]
            batch["labels"] = torch.tensor([int(label) if _is_known(label) else UNKNOWN for label in labels])
        return batch


def _to_rgb(image: Any) -> Image.Image:
    image = decode(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"An 'image' to evaluate on is a {type(image).__name__}; pass a PIL image, or one that datasets.Image() "
            "holds."
        )
    return to_rgb(image)


def _stack(examples: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.stack([torch.as_tensor(np.ascontiguousarray(example[name])) for example in examples])


def _is_known(label: Any) -> bool:
    return isinstance(label, (int, np.integer, torch.Tensor)) and int(label) >= 0
