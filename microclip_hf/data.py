"""From files to `datasets` objects with an `image` column and, where folders are classes, a `label` column."""

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .text_heads import abbreviate, check_class_names, normalize_name


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Class names from a text file in UTF-8, one a line; empty lines don't count.

    Raises:
        ValueError: if there are fewer than two or duplicates.
    """
    with open(path, encoding="utf-8-sig") as file:
        return check_class_names([line.strip() for line in file if line.strip()])


def load_image_folder(path: str | os.PathLike, class_names: Sequence[str], labels_required: bool = False) -> Dataset:
    """The images below a folder, each with its label if every sub-folder is named like a class.

    Args:
        path (`str` or `os.PathLike`): images at any depth, flat or one sub-folder a class.
        class_names (`Sequence[str]`): folder names match whatever their case, `_` and `-`.
        labels_required (`bool`): folders that aren't classes are an error; otherwise the images count as unlabelled.

    Returns:
        `Dataset` with `image`, and `label` (an index into `class_names`) where folders are classes.

    Raises:
        ValueError: if there is no such folder, no image in it, or `labels_required` and folders aren't classes.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{path} isn't a folder; pass the folder that holds the images.")
    if not any(Path(name).suffix.lower() in ImageFolder.EXTENSIONS for *_, names in os.walk(path) for name in names):
        raise ValueError(f"{path} holds no image files; pass the folder that holds the images (JPEG, PNG, ...).")
    # One pattern for all: a class called "test" is no split of its own.
    dataset = load_dataset("imagefolder", data_dir=os.fspath(path), data_files={"train": "**"}, split="train")
    columns = [name for name in ("image", "label") if name in dataset.column_names]
    dataset = dataset.select_columns(columns)
    folders = dataset.features["label"].names if "label" in columns else []
    position = {normalize_name(name): i for i, name in enumerate(class_names)}
    unknown = [name for name in folders if normalize_name(name) not in position]
    if labels_required and (unknown or not folders):
        found = f"the folders {abbreviate(unknown)}" if unknown else "no sub-folders of one depth"
        raise ValueError(
            f"{path} has {found}; to measure accuracy every sub-folder must be named like one of the "
            f"{len(class_names)} classes ({abbreviate(class_names)})."
        )
    if unknown or not folders:
        return dataset.select_columns(["image"])
    labels = [position[normalize_name(folders[label])] for label in dataset["label"]]
    return (
        dataset.remove_columns("label")
        .add_column("label", labels)
        .cast_column("label", ClassLabel(names=list(class_names)))
    )
