"""From files to `datasets` objects with an `image` column and, where folders are classes, a `label` column."""

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .text_heads import abbreviate, check_class_names, normalize_name


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Class names from a text file in UTF-8, one a line; empty lines don't count.

    Raises:
        ValueError: if it isn't UTF-8, or there are fewer than two names or duplicates.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't text in UTF-8; save it in that encoding. ({error})") from error
    return check_class_names([line.strip() for line in lines if line.strip()])


def load_image_folder(path: str | os.PathLike, class_names: Sequence[str], labels_required: bool = False) -> Dataset:
    """The images below a folder, each with its label if every image lies in a sub-folder named like a class.

    Args:
        path (`str` or `os.PathLike`): images at any depth, in one sub-folder a class or not. Links are followed;
            hidden files and what isn't an image by its ending are passed over.
        class_names (`Sequence[str]`): folder names match whatever their case, `_` and `-`.
        labels_required (`bool`): folders that aren't classes are an error; otherwise the images count as unlabelled.

    Returns:
        `Dataset` with `image`, and `label` (an index into `class_names`) where folders are classes.

    Raises:
        ValueError: if there is no such folder, no image in it, or `labels_required` and folders aren't classes.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{path} isn't a folder; pass the folder that holds the images.")
    files = _image_files(path)
    if not files:
        raise ValueError(f"{path} holds no image files; pass the folder that holds the images (JPEG, PNG, ...).")
    dataset = Dataset.from_dict({"image": [str(Path(path, file)) for file in files]}).cast_column("image", Image())
    if any(len(file.parts) == 1 for file in files):
        if labels_required:
            raise ValueError(
                f"{path} has images that lie in no sub-folder; to measure accuracy every image must lie in a "
                f"sub-folder named like one of the {len(class_names)} classes ({abbreviate(class_names)})."
            )
        return dataset
    folders = sorted({file.parts[0] for file in files})
    dataset = dataset.add_column("label", [folders.index(file.parts[0]) for file in files])
    try:
        return align_labels(dataset.cast_column("label", ClassLabel(names=folders)), class_names)
    except ValueError:
        if labels_required:
            raise
        return dataset.remove_columns("label")


def _image_files(path: str | os.PathLike) -> list[Path]:
    """Paths relative to the folder, sorted."""
    files = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(folder, name).relative_to(path)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in ImageFolder.EXTENSIONS
        ]
    return sorted(files)


def align_labels(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The data set with its labels numbered like `class_names`.

    A `label` column of `ClassLabel` carries names of its own, in an order of its own (`imagefolder` sorts them). Names
    match whatever their case, `_` and `-`; labels without names are taken as they are.

    Raises:
        ValueError: if a name is no class.
    """
    feature = dataset.features.get("label")
    if not isinstance(feature, ClassLabel) or list(feature.names) == list(class_names):
        return dataset
    position = {normalize_name(name): i for i, name in enumerate(class_names)}
    if unknown := [name for name in feature.names if normalize_name(name) not in position]:
        raise ValueError(
            f"The data set has the labels {abbreviate(unknown)}, none of the {len(class_names)} classes "
            f"({abbreviate(class_names)}). Rename them, or remove the column with remove_columns('label')."
        )
    numbers = [position[normalize_name(name)] for name in feature.names]
    # Hidden labels are -1 or missing.
    labels = [numbers[label] if label is not None and label >= 0 else label for label in dataset["label"]]
    dataset = dataset.remove_columns("label").add_column("label", labels)
    return dataset.cast_column("label", ClassLabel(names=list(class_names)))
