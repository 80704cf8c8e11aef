"""Tables of images: Parquet, Arrow and WebDataset files, saved data sets and the Hub's, as `image` and `label`."""

import glob
import os
import tarfile
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..text_heads import abbreviate
from .image_columns import CONTENTS, PATHS, StoredImage, as_images, has_type, holds_files, undecoded
from .labels import DataSource, can_be_labels, warn_left_out
from .parquet_stream import check_column, stream_parquet


# What `datasets` raises for files that aren't what they should be.
LOADING_ERRORS = (OSError, ValueError, DatasetsError, pa.ArrowException, tarfile.TarError)


def read_files(
    source: str, kind: str, files: Sequence[str], streaming: bool, image_column: str | None = None
) -> Dataset | IterableDataset:
    """All columns of files on disk, by the builder `kind` of `datasets`.

    An error if they're empty or unreadable, or if streamed Parquet files differ in what their images are.
    """
    paths = [os.path.abspath(file) for file in files]
    for path in paths:
        _check_path(path)
    if kind != "webdataset":
        paths = [path for path in paths if _has_rows(kind, path)]
    if not paths:
        raise ValueError(f"{source} has no rows; pass a table of images.")
    if kind == "parquet" and streaming:
        try:
            stream = stream_parquet(paths)
        except LOADING_ERRORS as error:
            raise _unreadable(source, error) from error
        check_column(paths, _find_images(stream.features, source, image_column), stream.features)
        return stream
    reading = {"data_files": [glob.escape(path) for path in paths], "split": "train"}
    if kind == "webdataset" and not streaming:
        return _prepare_photos(source, kind, reading)
    return _load(source, kind, streaming=streaming, **reading)


def read_repository(source: str, *arguments: Any, **options: Any) -> Dataset | IterableDataset:
    """All columns of a data set on the Hub, or of a copy of its repository here; errors as in [`read_files`]."""
    if not os.path.isdir(source):
        return _load(source, source, *arguments, **options)
    path = os.path.abspath(source)
    _check_path(path, *"*?[")
    return _load(source, path, *arguments, **options)


def is_saved(source: str) -> bool:
    """Whether `save_to_disk` wrote a folder; an error if it holds several splits."""
    if os.path.exists(os.path.join(source, "dataset_dict.json")):
        raise ValueError(f"{source} holds several splits; pass the folder of one of them, such as {source}/train.")
    return os.path.exists(os.path.join(source, "state.json"))


def read_saved(source: str, streaming: bool) -> Dataset | IterableDataset:
    """All columns of what `save_to_disk` wrote; errors as in [`read_files`]."""
    path = os.path.abspath(source)
    _check_path(path, expanded=False)
    try:
        dataset = load_from_disk(path)
    except IndexError as error:  # of a table that was saved without any file
        raise ValueError(f"{source} has no rows; pass a table of images.") from error
    except (*LOADING_ERRORS, KeyError, TypeError) as error:
        raise _unreadable(source, error) from error
    return dataset.to_iterable_dataset() if streaming else dataset


def select_columns(
    dataset: DataSource, source: str, image_column: str | None, label_column: str | None, labels_required: bool
) -> DataSource:
    """Only `image` and, where there is one and `label_column` isn't `None`, `label`, of a data set whose features are
    known; see `open_dataset`.
    """
    image_column = _find_images(dataset.features, source, image_column)
    if has_type(dataset.features[image_column], PATHS):
        _check_paths(dataset, source, image_column)
    if image_column == label_column:
        raise ValueError(f"{source}: image_column and label_column are both {label_column!r}; say which is which.")
    wants_labels = label_column is not None
    problem = _label_problem(dataset.features, source, label_column) if wants_labels else None
    if problem and labels_required:
        raise ValueError(f"{problem} Say which one with label_column.")
    if problem and label_column in dataset.features:
        warn_left_out(source, problem)
    dataset = undecoded(as_images(dataset, image_column), image_column)  # whatever maps a stream decodes it
    names = {image_column: "image"}
    if wants_labels and not problem:
        dataset = _with_field(dataset, label_column)
        names[label_column] = "label"
    dataset = dataset.select_columns(list(names))
    # One of the other columns may have had the new name.
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _load(source: str, *arguments: Any, **options: Any) -> Dataset | IterableDataset:
    try:
        dataset = load_dataset(*arguments, **options)
        if dataset.features is None:
            dataset = dataset._resolve_features()  # of a stream whose first examples tell them
    except LOADING_ERRORS as error:
        raise _unreadable(source, error) from error
    return dataset


def _prepare_photos(source: str, kind: str, reading: dict[str, Any]) -> Dataset:
    """Rows written to the cache with their photos, in place of files here of the same names (see [`StoredImage`])."""
    features = _load(source, kind, streaming=True, **reading).features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    dataset = _load(source, kind, features=Features({**features, **dict.fromkeys(images, StoredImage())}), **reading)
    for name in images:
        dataset = dataset.cast_column(name, features[name])  # unlike `cast` it copies nothing
    return dataset


def _unreadable(source: str, error: Exception) -> ValueError:
    reason = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return ValueError(f"The data set {source} can't be loaded: {error}{reason}")


def _check_path(path: str, *wildcards: str, expanded: bool = True) -> None:
    """Refuse a path that `datasets` wouldn't take as it is: with "::", `wildcards` or, if `expanded`, a variable."""
    special = [text for text in ("::", *wildcards) if text in path]
    if expanded and os.path.expandvars(path) != path:
        special += [text for text in "$%" if text in path]
    if special:
        raise ValueError(
            f"The path {path} has {abbreviate(special)}, which `datasets` doesn't take as part of a name; rename the "
            "file or folder."
        )


def _has_rows(kind: str, path: str) -> bool:
    """Whether a Parquet file has rows, which `datasets` needs; refuses unreadable files and columns of one name."""
    has_rows = True
    try:
        with open(path, "rb") as file:
            if kind == "parquet":
                metadata = pq.read_metadata(file)
                names = metadata.schema.to_arrow_schema().names
                has_rows = metadata.num_rows > 0
            else:
                names = _open_arrow(file).schema.names
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} can't be read: {error}. Remove it, or get it again.") from error
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} has several columns called {abbreviate(repeated)}; rename them.")
    return has_rows


def _open_arrow(file: Any) -> pa.RecordBatchReader | pa.ipc.RecordBatchFileReader:
    try:
        return pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(file)


def _find_images(features: Features, source: str, image_column: str | None) -> str:
    """The column of images, or of what is in image files or where they are."""
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if image_column is None and len(images) == 1:
        return images[0]
    if image_column is None and not images:
        image_column = _find_contents(features)
    images = images or _find_stored(features)
    if image_column not in features:
        unknown = "" if image_column is None else f"There is no column {image_column!r}: "
        raise ValueError(
            f"{unknown}{source} has the columns {abbreviate(list(features))}, of which {abbreviate(images) or 'none'} "
            "hold images; say which one is meant with image_column."
        )
    feature = features[image_column]
    if not isinstance(feature, Image) and not holds_files(feature):
        raise ValueError(
            f"The column {image_column!r} of {source} holds {feature}, not images, nor their bytes or paths; those "
            f"that hold images are {abbreviate(images) or 'none'}. Say which one is meant with image_column, or cast "
            "it with cast_column(..., datasets.Image())."
        )
    return image_column


def _find_contents(features: Features) -> str | None:
    """The column of what `Image` would store, if it is clear which: by its type, or else by its name."""
    contents = _find_stored(features) or [name for name, feature in features.items() if has_type(feature, CONTENTS)]
    if len(contents) == 1:
        return contents[0]
    return "image" if holds_files(features.get("image")) else None


def _find_stored(features: Features) -> list[str]:
    """The columns of what `Image` would store."""
    return [name for name, feature in features.items() if isinstance(feature, dict) and holds_files(feature)]


def _check_paths(dataset: DataSource, source: str, column: str) -> None:
    """Strings that are no paths are refused, going by the first."""
    paths = (example[column] for example in dataset.select_columns([column]))
    path = next((path for path in paths if path), "")
    if not os.path.isfile(path) and "://" not in path:
        raise ValueError(
            f"The column {column!r} of {source} holds {dataset.features[column]}, not images; the first, {path!r}, "
            f"is no file's path as seen from {os.getcwd()}. Say which column is meant with image_column, or make the "
            "paths absolute."
        )


def _label_problem(features: Features, source: str, label_column: str) -> str | None:
    parent, _, field = label_column.partition(".")
    feature = features.get(label_column)
    if feature is None and isinstance(features.get(parent), dict):
        feature = features[parent].get(field)
    if feature is None:
        return f"{source} has the columns {abbreviate(list(features))}; to measure accuracy it needs one of labels."
    if can_be_labels(feature):
        return None
    fields = [f"{label_column}.{name}" for name in feature] if isinstance(feature, dict) else []
    hint = f", or a field of them: {abbreviate(fields)}" if fields else ""
    return f"The labels of {source} are {feature}; expected a column of names or numbers of classes{hint}."


def _with_field(dataset: DataSource, column: str) -> DataSource:
    """The data set with a field of a column, "column.field", as a column of its own."""
    if column in dataset.features:
        return dataset
    parent, _, field = column.partition(".")
    feature = dataset.features[parent][field]
    if isinstance(dataset, Dataset):
        return dataset.add_column(column, [row and row[field] for row in dataset[parent]], feature=feature)
    features = Features({**dataset.features, column: feature})
    return dataset.map(_take_field, features=features, fn_kwargs={"parent": parent, "field": field})


def _take_field(example: dict[str, Any], parent: str, field: str) -> dict[str, Any]:
    row = example[parent]
    return {f"{parent}.{field}": row and row[field]}
