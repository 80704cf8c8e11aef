"""Tables of predictions, as `microclip predict` writes them."""

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import read_text, write_whole
from ..prediction.labelling import PARQUET
from ..prediction.predictions import column_names
from ..text_heads import abbreviate


MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.bin")
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Answer:
    """What a model says of a photo: classes, best first, and the score of the best."""

    names: list[str]
    score: float

    @property
    def label(self) -> str:
        """The best class."""
        return self.names[0]


# What a model says of each photo, by its name; `None` of those that can't be read.
Table = dict[str, Answer | None]


def is_table(source: str) -> bool:
    """Whether a model's source is a table of what it predicted."""
    return source.lower().endswith((".csv", PARQUET))


def read_table(path: str | os.PathLike) -> Table:
    """What `microclip predict` wrote, with any number of classes a photo.

    Raises:
        ValueError: if it has other columns, a row of another length, a score that is no number, or a file twice.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path}; pass one that microclip predict wrote, or the model itself.")
    head, *rows = _read_rows(path)
    columns = column_names(max(1, len(head) // 2))
    if head != columns:
        raise ValueError(
            f"{path} begins with {','.join(head)!r}; expected {','.join(columns)!r}, as microclip predict writes it."
        )
    table: Table = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns) or row[0] in table:
            problem = "names a file again" if len(row) == len(columns) else f"has {len(row)} values"
            raise ValueError(f"{path}: line {number} {problem}; take the file as microclip predict wrote it.")
        table[row[0]] = _read_answer(path, number, row)
    return table


def _read_rows(path: str | os.PathLike) -> list[list[str]]:
    """All cells, the names of columns first; an empty one where there is nothing."""
    try:
        if str(path).lower().endswith(PARQUET):
            table = pq.read_table(path)
            rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
            return [table.column_names, *(["" if cell is None else str(cell) for cell in row] for row in rows)]
        return list(csv.reader(io.StringIO(read_text(path)), strict=True)) or [[]]
    except (csv.Error, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} can't be read as a table: {error}") from error


def _read_answer(path: str | os.PathLike, number: int, row: Sequence[str]) -> Answer | None:
    if not row[1]:
        return None
    try:
        return Answer([name for name in row[1::2] if name], float(row[2]))
    except ValueError as error:
        raise ValueError(f"{path}: line {number} has a score that is no number: {error}") from error


def copy_table(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Write a table as CSV, as a whole."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_read_rows(source))
    write_whole(path, text.getvalue())


def check_tables(tables: Mapping[str, Table]) -> list[str]:
    """The photos, in order, that both tables have a label of; an error where they aren't of the same photos."""
    (one, first), (other, second) = tables.items()
    for place, apart in ((one, first.keys() - second.keys()), (other, second.keys() - first.keys())):
        if apart:
            raise ValueError(
                f"{len(apart)} photos are in the predictions of the {place} model alone "
                f"({abbreviate(sorted(apart))}); pass predictions of the same photos."
            )
    names = sorted(name for name in first if first[name] is not None and second[name] is not None)
    if not names:
        raise ValueError("No photo has a label in both tables of predictions, so there is nothing to compare.")
    return names


def fingerprint(source: str | os.PathLike) -> str | None:
    """SHA-256 of a model's weights and configurations in a folder, or of a file; `None` of what isn't here."""
    path = Path(source)
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern)}) if path.is_dir() else [path]
    if not all(map(os.path.isfile, files)) or not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
