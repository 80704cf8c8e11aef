"""From files to `datasets` objects with an `image` column and, where folders are classes, a `label` column."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, IterableDataset

from .folders import match_files
from .labels import DataSource, align_labels, align_or_leave_out, labelled, name_labels
from .photo_files import holds_photos, photo_files, refuse_undecodable
from .tables import is_saved, read_files, read_repository, read_saved, select_columns


# The builders of `datasets` for files on disk.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}


def load_images(source: str, class_names: Sequence[str], **options: Any) -> Dataset | IterableDataset:
    """[`open_dataset`] with labels that are numbered like classes; `options` are its own.

    Example:
    ```python
    >>> import os
    >>> from PIL import Image
    >>> from microclip_hf.data import load_images

    >>> os.makedirs("photos/red_disc")
    >>> Image.new("RGB", (64, 48), "red").save("photos/red_disc/1.png")
    >>> dataset = load_images("photos", class_names=["green square", "red disc"])
    >>> dataset[0]["label"]
    1
    ```
    """
    return open_dataset(source, class_names=class_names, **options)


def open_dataset(
    source: str,
    hub: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    labels_required: bool | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset | IterableDataset:
    """Images from a folder, from Arrow, Parquet or WebDataset files, or from the Hub, and their labels.

    Args:
        source (`str`): a folder of images (see [`load_image_folder`]), one written by `save_to_disk`, a folder or a
            pattern of `.parquet`, `.tar` (WebDataset) or `.arrow` files.
        hub (`bool`): `source` is the id of a data set on the Hub instead, or a copy of its repository here.
        config_name, revision, split (`str`): the Hub data set's.
        image_column (`str`, *optional*): images, or their bytes or paths. Default: the only column that holds such.
        label_column (`str`, *optional*): labels, or a field of a column, as in "json.label". Default: "label", if any.
        streaming (`bool`): read while training, not before; labels too are judged as they are read.
        labels_required (`bool`, *optional*): whether the lack of labels is an error. Default: where a table lacks the
            `label_column` that is given. Labels that aren't required and can't be any are left out, with a warning.
        class_names (`Sequence[str]`, *optional*): classes that labels must be, and are numbered like (see
            [`align_labels`]). Default: labels stay as the source numbers and names them.

    Returns:
        `image`, and `label` where there is one; other columns are left out.

    Raises:
        ValueError: if there is no such source, column, image or (where required) label.
    """
    files = [] if hub else table_files(source)
    if hub:
        dataset = read_repository(source, config_name, split=split, revision=revision, streaming=streaming)
    elif files:
        kind = next(kind for ending, kind in BUILDERS.items() if files[0].endswith(ending))
        dataset = read_files(source, kind, files, streaming, image_column)
    elif is_saved(source):
        dataset = read_saved(source, streaming)
    elif streaming:
        raise ValueError(f"{source} is a folder of images, which are read one by one anyway; leave out streaming.")
    else:
        return load_image_folder(source, class_names, bool(labels_required))
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{source} has no rows; pass a table of images.")
    required = label_column is not None if labels_required is None else labels_required
    dataset = select_columns(dataset, source, image_column, label_column or "label", required)
    if isinstance(dataset, Dataset):
        dataset = name_labels(dataset)
        if labels_required and not labelled(dataset):
            raise ValueError(f"None of the {len(dataset)} images of {source} has a label; pass images with labels.")
    return _number_labels(dataset, source, class_names, required)


def load_image_folder(
    path: str | os.PathLike, class_names: Sequence[str] | None, labels_required: bool = False
) -> Dataset:
    """The images below a folder, each with its label if every image lies in a sub-folder named like a class.

    Args:
        path (`str` or `os.PathLike`): images at any depth, in one sub-folder a class or not (see [`photo_files`]).
        class_names (`Sequence[str]`, *optional*): folders match, case, `_` and `-` aside. `None`: their names.
        labels_required (`bool`): folders that aren't classes are an error; otherwise the images count as unlabelled.

    Returns:
        `Dataset` with `image`, and `label` (an index into `class_names`) where folders are classes.

    Raises:
        ValueError: if there is no such folder or image, one can't be listed, or labels are required and lacking.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{path} isn't a folder; pass the folder that holds the images.")
    files = photo_files(path)
    # To `datasets` a relative path such as "C:photos/1.png" is an address.
    root = os.path.abspath(path) if ":" in str(path) else path
    paths = [str(Path(root, file)) for file in files]
    refuse_undecodable(paths)
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    if any(len(file.parts) == 1 for file in files):
        if labels_required:
            raise ValueError(
                f"{path} has images that lie in no sub-folder; put every image into a sub-folder named like its class."
            )
    else:
        folders = _class_folders(path, files)
        numbers = [folders.index(file.parts[0]) for file in files]
        dataset = dataset.add_column("label", numbers).cast_column("label", ClassLabel(names=folders))
    return _number_labels(dataset, path, class_names, labels_required)


def _number_labels(
    dataset: DataSource, source: str | os.PathLike, class_names: Sequence[str] | None, required: bool
) -> DataSource:
    """Labels numbered like `class_names`; where they aren't classes and aren't required, none."""
    if class_names is None:
        return dataset
    return align_labels(dataset, class_names) if required else align_or_leave_out(dataset, class_names, str(source))


def table_files(source: str) -> list[str]:
    """The files of a kind of `BUILDERS` in a folder, which must hold no other photos, or that a pattern stands for."""
    is_folder = os.path.isdir(source)
    # What `save_to_disk` wrote is read as a whole.
    if is_saved(source):
        return []
    patterns = {ending: os.path.join(source, f"*{ending}") if is_folder else source for ending in BUILDERS}
    kinds = {ending: match_files(pattern) for ending, pattern in patterns.items() if pattern.endswith(ending)}
    kinds = {ending: files for ending, files in kinds.items() if files}
    if not kinds:
        return []
    ending, *others = kinds
    others = [f"{other} files" for other in others] or (["images"] if is_folder and holds_photos(source) else [])
    if others:
        raise ValueError(
            f"{source} holds both {others[0]} and {ending} files; pass '{patterns[ending]}' for these, or move them "
            "away."
        )
    return kinds[ending]


def _class_folders(path: str | os.PathLike, files: Sequence[Path]) -> list[str]:
    """The sub-folders that hold images, sorted; also links to these, whose images count by the other name."""
    folders = {file.parts[0] for file in files}
    real_paths = {os.path.realpath(os.path.join(path, folder)) for folder in folders}
    links = {entry.name for entry in os.scandir(path) if entry.is_symlink() and not entry.name.startswith(".")}
    folders |= {link for link in links if os.path.realpath(os.path.join(path, link)) in real_paths}
    return sorted(folders)
