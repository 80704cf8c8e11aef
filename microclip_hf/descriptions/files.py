"""Descriptions of classes: CuPL's JSON `{"class": ["sentence", ...]}`, lines of text, or columns of a data set."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetsError

from ..files import parse_json, read_text, write_whole
from ..text_heads import abbreviate, contrast_spellings, match_descriptions, normalize_name


def read_descriptions(
    path: str | os.PathLike, class_names: Sequence[str], names_place: str = "the class names"
) -> dict[str, list[str]]:
    """Read and check a descriptions file.

    Args:
        path (`str` or `os.PathLike`): JSON, or (`.txt`) lines `class: sentence`, several a class.
        class_names (`Sequence[str]`): keys match them whatever their case, `_` and `-`. Where a line of text begins
            with several, as in `iris: dwarf: ...`, the longest is meant.
        names_place (`str`): where an error says that the class names stand, such as their file.

    Returns:
        `dict[str, list[str]]`: the sentences of the classes that have any, under the names in `class_names`.

    Raises:
        TypeError, ValueError: if the file can't be read, or its contents don't fit (see [`match_descriptions`]).
    """
    if os.fspath(path).lower().endswith(".txt"):
        descriptions = _read_lines(path, class_names, names_place)
    else:
        descriptions = parse_json(path, read_text(path), '{"class": ["sentence", ...]}')
    return _by_class(class_names, descriptions, os.fspath(path), names_place)


def load_descriptions(source: str, class_names: Sequence[str], columns: Sequence[str] | None) -> dict[str, list[str]]:
    """Descriptions from the training split of a data set; for the rest see [`read_description_columns`].

    Args:
        source (`str`): its id on the Hub, or the folder of a copy.

    Raises:
        ValueError: if there is no such data set, or its contents don't fit.
    """
    try:
        dataset = load_dataset(source, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"The descriptions {source} can't be loaded: {error}") from error
    return read_description_columns(dataset, class_names, columns)


def read_description_columns(
    dataset: Dataset, class_names: Sequence[str], columns: Sequence[str] | None
) -> dict[str, list[str]]:
    """Descriptions from two columns of a data set. Classes of it that aren't among `class_names` are passed over.

    Args:
        columns (`Sequence[str]`): the names of the column of classes (names, or `ClassLabel`) and of the column of
            sentences (a string or a list of strings in each row); a class may have several rows.

    Returns:
        `dict[str, list[str]]`: the sentences of the classes that have any, under the names in `class_names`.

    Raises:
        ValueError: if there are no such columns, a row has no class or no sentence, or no class is known.
    """
    _check_columns(dataset, columns)
    feature = dataset.features[columns[0]]
    keys = set(map(normalize_name, class_names))
    descriptions: dict[str, list[str]] = {}
    passed_over = set()
    for number, row in enumerate(dataset.select_columns(list(columns))):
        name, sentences = (row[column] for column in columns)
        if isinstance(feature, ClassLabel) and name is not None:
            name = feature.int2str(name)
        if not isinstance(name, str) or not sentences:
            raise ValueError(
                f"Row {number} has the class {name!r} and the sentences {sentences!r}; both must be text."
            )
        key = normalize_name(name)
        if key in keys:
            descriptions.setdefault(key, []).extend([sentences] if isinstance(sentences, str) else sentences)
        else:
            passed_over.add(name)
    if not descriptions:
        raise ValueError(
            f"None of the classes in column {columns[0]!r} ({abbreviate(sorted(passed_over))}) is one of the "
            f"{len(class_names)} class names ({abbreviate(class_names)})."
        )
    if passed_over:
        warnings.warn(
            f"{len(passed_over)} described classes aren't among the {len(class_names)} class names and are passed "
            f"over: {abbreviate(sorted(passed_over))}.",
            stacklevel=2,
        )
    return _by_class(class_names, descriptions)


def _check_columns(dataset: Dataset, columns: Sequence[str] | None) -> None:
    names = abbreviate(dataset.column_names)
    if columns is None or len(columns) != 2:
        raise ValueError(
            f"Of the columns {names} two are needed, that of the classes and that of the sentences; got {columns}."
        )
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"There is no column {column!r}; the data set has {names}.")


def save_descriptions(path: str | os.PathLike, described: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Write a descriptions file in JSON, as a whole or not at all; halves of characters become JSON's escapes.

    Args:
        described (`Iterable[tuple[str, Sequence[str]]]`): each class with its sentences.

    Returns:
        `str`: the file's SHA-256.
    """
    write_whole(Path(path), json.dumps(dict(described), ensure_ascii=False, indent=1) + "\n")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _by_class(class_names: Sequence[str], content: Any, *places: str) -> dict[str, list[str]]:
    matched = match_descriptions(class_names, content, *places)
    return {name: sentences for name, sentences in zip(class_names, matched, strict=True) if sentences is not None}


def _read_lines(path: str | os.PathLike, class_names: Sequence[str], names_place: str) -> dict[str, list[str]]:
    keys = set(map(normalize_name, class_names))
    descriptions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        parts = line.split(":")
        ends = [end for end in range(1, len(parts)) if normalize_name(":".join(parts[:end])) in keys]
        if not ends:
            raise ValueError(
                f"{path}, line {number}, is {line[:80]!r}; expected 'class: sentence' with one of the "
                f"{len(class_names)} class names ({abbreviate(class_names)})."
                f"{contrast_spellings(parts[0].strip(), class_names, names_place) if parts[1:] else ''}"
            )
        end = ends[-1]  # names may hold colons themselves, and the longest one counts
        sentences = descriptions.setdefault(normalize_name(":".join(parts[:end])), [])
        sentences.append(":".join(parts[end:]).strip())
    return descriptions
