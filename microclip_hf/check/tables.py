"""Tables of predictions, as `microclip predict` writes them: of a model that is run here, or from a file."""

import csv
import hashlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from ..files import read_text, write_whole
from ..modeling_microclip import MicroCLIPForImageClassification
from ..prediction import COLUMNS, Prediction, predict_photos, table_row
from ..text_heads import abbreviate


# What a model says of each photo, by its name; `None` of those that can't be read.
Table = dict[str, Prediction | None]
WEIGHTS = ("config.json", "*.safetensors", "*.bin")
CHUNK = 1 << 20  # bytes


def is_table(source: str) -> bool:
    """Whether a model's source is a table of what it predicted."""
    return source.lower().endswith(".csv")


def predict_table(
    model: MicroCLIPForImageClassification, photos: Mapping[str, Path], batch_size: int, title: str
) -> Table:
    """Classify photos, with a progress bar; what can't be read is told on stderr."""
    table: Table = {}
    results = predict_photos(model, photos.values(), batch_size)
    for name, result in zip(photos, tqdm(results, title, len(photos), unit="photo"), strict=True):
        if isinstance(result, Exception):
            tqdm.write(f"{photos[name]} can't be read: {result}", file=sys.stderr)
        table[name] = None if isinstance(result, Exception) else result
    return table


def read_table(path: str | os.PathLike) -> Table:
    """What `microclip predict` wrote.

    Raises:
        ValueError: if it has other columns, a row of another length, a score that is no number, or a file twice.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path}; pass one that microclip predict wrote, or the model itself.")
    try:
        head, *rows = list(csv.reader(io.StringIO(read_text(path)), strict=True)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} isn't a CSV file: {error}") from error
    if tuple(head) != COLUMNS:
        raise ValueError(
            f"{path} begins with {','.join(head)!r}; expected {','.join(COLUMNS)!r}, as microclip predict writes it."
        )
    table: Table = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != len(COLUMNS) or row[0] in table:
            problem = "names a file again" if len(row) == len(COLUMNS) else f"has {len(row)} values"
            raise ValueError(f"{path}: line {number} {problem}; take the file as microclip predict wrote it.")
        table[row[0]] = _read_prediction(path, number, row)
    return table


def _read_prediction(path: str | os.PathLike, number: int, row: Sequence[str]) -> Prediction | None:
    _, label, score, runner_up, runner_up_score = row
    if not label:
        return None
    try:
        return Prediction(label, float(score), runner_up, float(runner_up_score))
    except ValueError as error:
        raise ValueError(f"{path}: line {number} has a score that is no number: {error}") from error


def write_table(path: str | os.PathLike, table: Table) -> None:
    """Write a table as `microclip predict` does, as a whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(table_row(name, prediction) for name, prediction in table.items())
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
    """SHA-256 of a model's weights and configuration in a folder, or of a file; `None` of what isn't here."""
    path = Path(source)
    files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)}) if path.is_dir() else [path]
    if not all(map(os.path.isfile, files)) or not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
