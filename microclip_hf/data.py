"""From files to `datasets` objects with an `image` column and, where folders are classes, a `label` column."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .class_names import read_class_names as read_class_names  # for callers, with the images
from .images import holds_photos, photo_files, refuse_undecodable
from .text_heads import abbreviate, normalize_name, suggest


DataSource = TypeVar("DataSource", Dataset, IterableDataset)


def load_images(
    source: str, class_names: Sequence[str], labels_required: bool = False, **options: Any
) -> Dataset | IterableDataset:
    """Images from a folder, from Arrow, Parquet or WebDataset files, or from the Hub; labels numbered like classes.

    Args:
        source, options: see [`open_dataset`].
        class_names (`Sequence[str]`): the classes, which named labels are numbered like.
        labels_required (`bool`): whether labels that aren't classes, or none, are an error.

    Returns:
        `Dataset` or `IterableDataset` with `image`, and `label` where there is one of the classes.

    Raises:
        ValueError: if there is no such source, column, or (where required) label.
    """
    return _number_labels(
        open_dataset(source, labels_required=labels_required, **options), class_names, labels_required
    )


def open_dataset(
    source: str,
    hub: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str = "label",
    streaming: bool = False,
    labels_required: bool = False,
) -> Dataset | IterableDataset:
    """Images, and labels as the source numbers and names them.

    Args:
        source (`str`): a folder of images (see [`load_image_folder`]), one written by `save_to_disk`, a folder or a
            pattern of `.parquet`, `.tar` (WebDataset) or `.arrow` files.
        hub (`bool`): `source` is the id of a data set on the Hub instead, or a copy of its repository here.
        config_name, revision, split (`str`): the Hub data set's.
        image_column (`str`, *optional*): default, the only column of images.
        label_column (`str`): labels; other columns are left out. A folder of images has no columns to choose from.
        streaming (`bool`): read while training, not before.
        labels_required (`bool`): whether the lack of labels is an error.

    Returns:
        `Dataset` or `IterableDataset` with `image`, and `label` where there is one.

    Raises:
        ValueError: if there is no such source, column, or (where required) label.
    """
    kind, files = (None, []) if hub else _file_kind(source)
    saved = os.path.exists(os.path.join(source, "state.json"))
    if not hub and os.path.exists(os.path.join(source, "dataset_dict.json")):
        raise ValueError(f"{source} holds several splits; pass the folder of one of them, such as {source}/train.")
    if not hub and kind is None and not saved:
        if streaming:
            raise ValueError(f"{source} is a folder of images, which are read one by one anyway; leave out streaming.")
        return _open_image_folder(source, labels_required)
    try:
        if hub:
            dataset = load_dataset(source, config_name, split=split, revision=revision, streaming=streaming)
        elif kind is not None:
            dataset = load_dataset(kind, data_files=files, split="train", streaming=streaming)
        else:
            dataset = load_from_disk(source)
            dataset = dataset.to_iterable_dataset() if streaming else dataset
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"The data set {source} can't be loaded: {error}") from error
    return _select_columns(dataset, source, image_column, label_column, labels_required)


def _number_labels(dataset: DataSource, class_names: Sequence[str], labels_required: bool) -> DataSource:
    """Labels numbered like `class_names`; where they aren't classes and aren't required, none."""
    try:
        return align_labels(dataset, class_names)
    except ValueError:
        if labels_required:
            raise
        return dataset.remove_columns("label")


def _file_kind(source: str) -> tuple[str | None, list[str]]:
    """The builder of `datasets` for a folder or pattern of files, and the files; `None` where it is neither."""
    for kind, ending in (("parquet", ".parquet"), ("webdataset", ".tar"), ("arrow", ".arrow")):
        pattern = os.path.join(glob.escape(source), f"*{ending}") if os.path.isdir(source) else source
        files = sorted(glob.glob(pattern)) if pattern.endswith(ending) else []
        if not files or os.path.exists(os.path.join(source, "state.json")):
            continue
        if os.path.isdir(source) and holds_photos(source):
            raise ValueError(
                f"{source} holds both images and {ending} files; pass '{os.path.join(source, '*' + ending)}' for "
                "these, or move them away."
            )
        return kind, files
    return None, []


def _select_columns(
    dataset: DataSource, source: str, image_column: str | None, label_column: str, labels_required: bool
) -> DataSource:
    """Only `image` and, where there is one, `label`."""
    if dataset.features is None:
        dataset = dataset._resolve_features()  # of a stream whose first example tells them
    columns = list(dataset.features)
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if image_column is None and len(images) == 1:
        image_column = images[0]
    if image_column not in columns:
        raise ValueError(
            f"{source} has the columns {abbreviate(columns)}, of which {abbreviate(images) or 'none'} hold images; "
            "say which one is meant with image_column."
        )
    if not isinstance(feature := dataset.features[image_column], Image):
        raise ValueError(
            f"The column {image_column!r} of {source} holds {feature}, not images; those that hold images are "
            f"{abbreviate(images) or 'none'}. Say which one is meant with image_column."
        )
    if image_column == label_column:
        raise ValueError(f"{source}: image_column and label_column are both {label_column!r}; say which is which.")
    if labels_required and label_column not in columns:
        raise ValueError(
            f"{source} has the columns {abbreviate(columns)}; to measure accuracy it needs one of labels. Say which "
            "one with label_column."
        )
    dataset = undecoded(dataset, image_column)  # first, since whatever maps a stream decodes it
    names = {image_column: "image"} | ({label_column: "label"} if label_column in columns else {})
    dataset = dataset.select_columns(list(names)).rename_columns(
        {old: new for old, new in names.items() if old != new}
    )
    label = dataset.features.get("label")
    if isinstance(dataset, Dataset) and isinstance(label, Value) and label.dtype == "string":
        dataset = dataset.class_encode_column("label")
    return dataset


def load_image_folder(path: str | os.PathLike, class_names: Sequence[str], labels_required: bool = False) -> Dataset:
    """The images below a folder, each with its label if every image lies in a sub-folder named like a class.

    Args:
        path (`str` or `os.PathLike`): images at any depth, in one sub-folder a class or not; which files count, says
            [`photo_files`].
        class_names (`Sequence[str]`): folder names match whatever their case, `_` and `-`.
        labels_required (`bool`): folders that aren't classes are an error; otherwise the images count as unlabelled.

    Returns:
        `Dataset` with `image`, and `label` (an index into `class_names`) where folders are classes.

    Raises:
        ValueError: if there is no such folder, no image in it, a folder in it that can't be listed, a name that isn't
            Unicode, or `labels_required` and folders aren't classes.
    """
    return _number_labels(_open_image_folder(path, labels_required), class_names, labels_required)


def _open_image_folder(path: str | os.PathLike, labels_required: bool) -> Dataset:
    """The images below a folder, each with the sub-folder that it lies in as its `label`, if every one lies in one."""
    if not os.path.isdir(path):
        raise ValueError(f"{path} isn't a folder; pass the folder that holds the images.")
    files = photo_files(path)
    paths = [str(Path(path, file)) for file in files]
    refuse_undecodable(paths)
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    if any(len(file.parts) == 1 for file in files):
        if labels_required:
            raise ValueError(
                f"{path} has images that lie in no sub-folder; put every image into a sub-folder named like its class."
            )
        return dataset
    folders = _class_folders(path, files)
    dataset = dataset.add_column("label", [folders.index(file.parts[0]) for file in files])
    return dataset.cast_column("label", ClassLabel(names=folders))


def _class_folders(path: str | os.PathLike, files: Sequence[Path]) -> list[str]:
    """The sub-folders that hold images, sorted; also links to these, whose images count by the other name."""
    folders = {file.parts[0] for file in files}
    real_paths = {os.path.realpath(os.path.join(path, folder)) for folder in folders}
    links = {entry.name for entry in os.scandir(path) if entry.is_symlink() and not entry.name.startswith(".")}
    folders |= {link for link in links if os.path.realpath(os.path.join(path, link)) in real_paths}
    return sorted(folders)


def align_labels(dataset: DataSource, class_names: Sequence[str]) -> DataSource:
    """The data set, or stream, with its labels numbered like `class_names`.

    A `label` column of `ClassLabel` carries names of its own, in an order of its own (`imagefolder` sorts them). Names
    match whatever their case, `_` and `-`; labels without names are taken as they are.

    Raises:
        ValueError: if a name or a number is no class.
    """
    feature = (dataset.features or {}).get("label")
    if isinstance(dataset, Dataset) and isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
        highest = max((label for label in dataset["label"] if label is not None), default=-1)
        if highest >= len(class_names):
            raise ValueError(
                f"The highest label is {highest}, and there are {len(class_names)} classes, numbered from 0. Number "
                "the labels like the class names, or leave the column of labels out."
            )
    if not isinstance(feature, ClassLabel) or list(feature.names) == list(class_names):
        return dataset
    position = {normalize_name(name): i for i, name in enumerate(class_names)}
    if unknown := [name for name in feature.names if normalize_name(name) not in position]:
        labels = set(map(normalize_name, feature.names))
        unlabelled = [name for name in class_names if normalize_name(name) not in labels]
        lacking = f"; the classes {abbreviate(unlabelled)} have no label" if unlabelled else ""
        raise ValueError(
            f"The labels {abbreviate(unknown)} are none of the {len(class_names)} classes{lacking}"
            f"{suggest(unknown[0], class_names)} Rename them, folders or entries of a column, or leave the labels out."
        )
    numbers = [position[normalize_name(name)] for name in feature.names]

    aligned = ClassLabel(names=list(class_names))
    if isinstance(dataset, IterableDataset):
        features = Features({**dataset.features, "label": aligned})
        return dataset.map(_renumber, features=features, fn_kwargs={"numbers": numbers})
    labels = [_renumber({"label": label}, numbers)["label"] for label in dataset["label"]]
    return dataset.remove_columns("label").add_column("label", labels).cast_column("label", aligned)


def undecoded(stream: Any, column: str = "image") -> Any:
    """A stream of `datasets` with its images as they are stored: an error in one then doesn't end it."""
    if not isinstance(stream, IterableDataset):
        return stream
    if stream.features is not None and isinstance(stream.features.get(column), Image):
        return stream.cast_column(column, Image(decode=False))
    return stream


def _renumber(example: dict[str, int | None], numbers: list[int]) -> dict[str, int | None]:
    """Hidden labels, -1 or missing, stay so."""
    label = example["label"]
    return {"label": numbers[label] if label is not None and label >= 0 else label}
