"""The table in which a person labels photos: `file,label`. No label in it is ever overwritten or lost."""

import csv
import io
import os
from collections.abc import Collection, Iterable, Sequence

from ..files import read_text, write_whole
from ..text_heads import abbreviate, contrast_spellings, name_positions, normalize_name


COLUMNS = ("file", "label")
# What else a label may be; an empty one says as little as this.
UNKNOWN = "unknown"
NONE_OF_THESE = "none of these"
NO_CLASS = -1  # the number of `NONE_OF_THESE`


def read_rows(path: str | os.PathLike) -> list[list[str]]:
    """The rows, `[file, label, ...]`, without the first; spreadsheets may have written semicolons or tabs.

    Raises:
        ValueError: if it is no such table.
    """
    text = read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = next((sign for sign in ";\t" if sign in first), ",")
    try:
        head, *rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} isn't a CSV file: {error}") from error
    if tuple(name.strip().lower() for name in head[:2]) != COLUMNS:
        raise ValueError(f"{path} begins with {first!r}; expected {','.join(COLUMNS)!r}. Write that line again.")
    return [[*row, ""][: max(2, len(row))] for row in rows if any(cell.strip() for cell in row[:2])]


def write_rows(path: str | os.PathLike, rows: Iterable[Sequence[str]]) -> None:
    """Write the table as a whole: what was there stays until all is written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_whole(path, text.getvalue())


def add_files(path: str | os.PathLike, files: Iterable[str]) -> int:
    """Add rows without a label for files that have none; returns how many. Rows that are there stay as they are."""
    rows = read_rows(path) if os.path.exists(path) else []
    known = {row[0] for row in rows}
    new = [[file, ""] for file in files if file not in known]
    write_rows(path, [*rows, *new])
    return len(new)


def set_label(path: str | os.PathLike, file: str, label: str) -> None:
    """Label one file; the table is read anew, so that what another program wrote meanwhile stays.

    Raises:
        ValueError: if the table has no such file.
    """
    rows = read_rows(path)
    mine = [row for row in rows if row[0] == file]
    if not mine:
        raise ValueError(f"{path} has no row of {file}; write it again, or take the table from a copy.")
    for row in mine:
        row[1] = label
    write_rows(path, rows)


def read_labels(path: str | os.PathLike, class_names: Sequence[str], drawn: Collection[str]) -> dict[str, int]:
    """The class index of each file that has a label, `NO_CLASS` for "none of these"; empty and "unknown" are left out.

    Labels match the class names as everywhere (see [`~text_heads.normalize_name`]).

    Args:
        path (`str` or `os.PathLike`): the table.
        class_names (`Sequence[str]`): all classes.
        drawn (`Collection[str]`): the files that were drawn.

    Raises:
        ValueError: if a label is no class, or a row is of a file that wasn't drawn, or was there before.
    """
    positions = {normalize_name(NONE_OF_THESE): NO_CLASS, **name_positions(class_names)}
    rows = read_rows(path)
    _check_files(path, [row[0] for row in rows], drawn)
    labels = {}
    unknown = []
    for file, label, *_ in rows:
        key = normalize_name(label)
        if key in positions:
            labels[file] = positions[key]
        elif key not in ("", normalize_name(UNKNOWN)):
            unknown.append((file, label))
    if unknown:
        raise _no_class(path, unknown, class_names)
    return labels


def _no_class(path: str | os.PathLike, rows: Sequence[tuple[str, str]], class_names: Sequence[str]) -> ValueError:
    """What there is to say of rows `(file, label)` whose labels are no class."""
    file, label = rows[0]
    others = f", as are {len(rows) - 1} other labels" if len(rows) > 1 else ""
    return ValueError(
        f"{path} labels {file} as {label!r}, which is none of the {len(class_names)} classes{others}."
        f"{contrast_spellings(label, class_names, 'the class names')} Write the name of a class, {NONE_OF_THESE!r}, "
        f"{UNKNOWN!r}, or nothing."
    )


def _check_files(path: str | os.PathLike, files: Sequence[str], drawn: Collection[str]) -> None:
    """Refuse rows of photos that weren't drawn, which would spoil the probabilities, and of one photo twice."""
    strange = [file for file in files if file not in drawn]
    if strange:
        raise ValueError(
            f"{path} has rows of photos that weren't drawn ({abbreviate(strange)}), {len(strange)} in all, which "
            "can't be counted. Move these rows to another file."
        )
    twice = sorted({file for file in files if files.count(file) > 1}) if len(set(files)) < len(files) else []
    if twice:
        raise ValueError(f"{path} has several rows of {abbreviate(twice)}; leave one of each.")
