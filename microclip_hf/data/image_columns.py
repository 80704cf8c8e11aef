"""The column of images in a data set: cast or left undecoded, what its images are called, which can't be read."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset, Value


NUM_NAMES = 3
# Types of columns that hold the contents, or the paths, of image files.
CONTENTS = ("binary", "large_binary")
PATHS = ("string", "large_string")


def as_images(dataset: Any, column: str = "image") -> Any:
    """A data set whose column holds paths or contents of image files with that cast to `Image`; any other as it is."""
    if not isinstance(dataset, (Dataset, IterableDataset)) or not holds_files((dataset.features or {}).get(column)):
        return dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    return dataset.cast_column(column, Image())


class StoredImage(Image):
    """What a stream has stored, undecoded. `Image` itself would take a file of the same path here, if there is one."""

    def __init__(self) -> None:
        super().__init__(decode=False)

    def encode_example(self, value: Any) -> dict[str, Any]:
        """As in the base class, unless the contents are there."""
        is_stored = isinstance(value, dict) and value.get("bytes") is not None
        return {"bytes": value["bytes"], "path": value.get("path")} if is_stored else super().encode_example(value)


def undecoded(stream: Any, column: str = "image") -> Any:
    """A stream of `datasets` with its images as they are stored: an error in one then doesn't end it."""
    if not isinstance(stream, IterableDataset):
        return stream
    if stream.features is not None and isinstance(stream.features.get(column), Image):
        return stream.cast_column(column, StoredImage())
    return stream


def image_names(dataset: Any) -> tuple[list[str], bool]:
    """A name for each image of a `datasets.Dataset`, empty where it has none; whether all are files of their own."""
    if not isinstance(dataset, Dataset) or not isinstance(dataset.features.get("image"), Image):
        return [], False
    columns = stored_images(dataset).flatten()  # paths can be read without the photos' bytes
    names = [path or "" for path in columns.select_columns(["image.path"])["image.path"][:]]
    contents = columns.data.column("image.bytes")
    return names, contents.null_count == len(contents)


def stored_images(dataset: Dataset) -> Dataset:
    """The column `image` alone, as it is stored."""
    return dataset.with_format(None).select_columns(["image"]).cast_column("image", Image(decode=False))


def gives_stored_images(dataset: Any) -> bool:
    """Whether it is a data set of `datasets` whose images come as they are stored, which threads may read, and no
    transform or mode of somebody's own makes them.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return False
    feature = dataset.features.get("image")
    return isinstance(feature, Image) and feature.mode is None


def describe_unreadable(dataset: Any, unreadable: torch.Tensor) -> str:
    """How many images can't be read, and which ones the first are; `unreadable` `(num_images,)`, bool."""
    images = stored_images(dataset) if isinstance(dataset, Dataset) else None
    names = []
    for index in unreadable.nonzero().flatten()[:NUM_NAMES].tolist():
        image = images[index]["image"] if images is not None else None
        names.append((image and image["path"]) or f"image {index}")
    more = ", ..." if unreadable.sum() > NUM_NAMES else ""
    return f"{unreadable.sum()} of {len(unreadable)} images can't be read ({', '.join(names)}{more})"


def holds_files(feature: Any) -> bool:
    """Whether a column holds contents of image files, paths, or both as `Image` stores them."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return has_type(feature, CONTENTS + PATHS)


def has_type(feature: Any, types: Sequence[str]) -> bool:
    """Whether a column holds single values of one of these types."""
    return isinstance(feature, Value) and feature.dtype in types
