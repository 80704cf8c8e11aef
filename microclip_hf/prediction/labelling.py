"""Labels of all photos of a source in one file, by one process or many, which goes on where it was interrupted."""

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..data.photo_sources import PhotoSource
from ..passes.photo_batches import PREPARATION, PixelReader, RowBatch, RowBatches
from ..passes.row_parts import RowParts, WrittenRows
from ..passes.row_pass import (
    PassSettings,
    compute_rows,
    count_workers,
    join_processes,
    load_batches,
    progress_bar,
)
from .predictions import Classifier, column_names


PARTS = ".parts"  # added to the output's name
PARQUET = ".parquet"
# Rows of a group of a Parquet file.
GROUP = 2**16


def print_aside(text: str) -> None:
    """A line on stderr, since stdout may be the table, that leaves a progress bar whole."""
    tqdm.write(text, file=sys.stderr)


@dataclass(frozen=True)
class LabelSettings(PassSettings):
    """How photos are read and labelled.

    Args:
        exact_pixels (`bool`): prepare large photos to the last bit as the processor does (see [`PixelReader`]).
        tell (`Callable[[str], None]`): what is done with a sentence about a photo that can't be read.
        keep_parts (`bool`): leave what was computed beside the output, until [`remove_parts`]; the same call then
            writes the output again without computing anything.
        batch_size, num_workers, title, progress: as in the base class.
    """

    exact_pixels: bool = False
    tell: Callable[[str], None] = print_aside
    keep_parts: bool = False


@dataclass
class LabelCounts:
    """How many photos there were, and how many got which label."""

    labels: Counter[str] = field(default_factory=Counter)
    num_photos: int = 0

    @property
    def num_unreadable(self) -> int:
        """Photos without a label."""
        return self.num_photos - self.labels.total()

    def follow(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Count rows as they pass; those of photos without a name are called by their number."""
        for table in tables:
            names = [name or str(self.num_photos + row) for row, name in enumerate(table["file"].to_pylist())]
            self.num_photos += len(table)
            self.labels.update(label for label in table["label"].to_pylist() if label is not None)
            yield table.set_column(0, "file", pa.array(names))


def label_photos(
    classify: Classifier, source: PhotoSource, output: str, settings: LabelSettings | None = None
) -> LabelCounts | None:
    """Write the labels of all photos, in their order; every process of a launch must call it.

    Each process writes the rows of its share to parts in a folder beside the output, `{output}.parts`, which must be
    one that all see. The first process joins them and removes that folder. Interrupted at any moment, the same call
    goes on with what isn't there yet, with any number of processes. On machines of one kind, with as many threads a
    process and the same batch size, the file is the same to the last bit however it came about.

    Args:
        classify ([`Classifier`]): what gives the scores.
        source ([`PhotoSource`]): the photos.
        output (`str`): a Parquet file if it ends like one, else CSV with scores of six digits; photos that can't be
            read have rows without labels. A file that exists is replaced.
        settings ([`LabelSettings`], *optional*): how photos are read.

    Returns:
        [`LabelCounts`] in the first process, `None` in the others.

    Raises:
        ValueError: if the folder holds parts of another model, other classes, photos or settings.
    """
    settings = settings or LabelSettings()
    pixels = {"exact_pixels": str(settings.exact_pixels), "preparation": PREPARATION}
    facts = {**pixels, **source.facts, **classify.facts()}
    parts = RowParts(f"{output}{PARTS}", facts)
    reader = PixelReader(classify.model.image_processor, settings.exact_pixels)
    device = classify.model.device
    compute_rows(parts, source, reader, lambda batch: _label(classify, batch, settings), device, settings)
    if not join_processes(device).is_main_process:
        return None
    counts = LabelCounts()
    with parts.whole_file(output) as incomplete:
        write = _write_parquet if output.endswith(PARQUET) else _write_csv
        write(incomplete, counts.follow(parts.read(source.num_shards)), classify.top_k)
    if not settings.keep_parts:
        parts.remove()
    return counts


def has_parts(output: str) -> bool:
    """Whether `keep_parts`, or an interruption, left something beside an output."""
    return os.path.isdir(f"{output}{PARTS}")


def remove_parts(output: str) -> None:
    """Remove what `keep_parts` left beside an output, if anything."""
    if has_parts(output):
        RowParts(f"{output}{PARTS}", {}).remove()


def print_labels(
    classify: Classifier, source: PhotoSource, file: TextIO, settings: LabelSettings | None = None
) -> LabelCounts:
    """The same by one process, as CSV that is written as the photos are labelled."""
    settings = settings or LabelSettings()
    device = classify.model.device
    reader = PixelReader(classify.model.image_processor, settings.exact_pixels)
    batches = RowBatches(source, WrittenRows(), reader, settings.batch_size, (0, 1))
    counts = LabelCounts()

    def tables() -> Iterator[pa.Table]:
        # Several workers would take turns.
        for batch in load_batches(batches, min(1, count_workers(settings, device)), device):
            if batch.names:
                yield _label(classify, batch, settings)
                bar.update(len(batch.names))

    with progress_bar(source, WrittenRows(), join_processes(device), settings) as bar:
        _write_rows(file, counts.follow(tables()), classify.top_k)
    return counts


def _label(classify: Classifier, batch: RowBatch, settings: LabelSettings) -> pa.Table:
    """The rows of a batch, in which photos that can't be read have no labels."""
    is_readable = np.array([problem is None for problem in batch.problems])
    for problem in filter(None, batch.problems):
        settings.tell(problem)
    # File names may be any bytes.
    names = [name and name.encode("utf-8", "backslashreplace").decode() for name in batch.names]
    columns = [pa.array(names, pa.string())]
    scores = np.zeros((len(names), classify.top_k), np.float32)
    labels = np.full((len(names), classify.top_k), None, object)
    if batch.inputs is not None:
        best = classify(batch.inputs)
        scores[is_readable] = best[0].numpy()
        labels[is_readable] = np.array(classify.class_names, object)[best[1].numpy()]
    for rank in range(classify.top_k):
        columns.append(pa.array(labels[:, rank], pa.string()))
        columns.append(pa.array(scores[:, rank], mask=~is_readable))
    return pa.table(dict(zip(column_names(classify.top_k), columns, strict=True)))


def _write_parquet(path: str, tables: Iterator[pa.Table], top_k: int) -> None:
    kinds = [pa.string(), *(kind for _ in range(top_k) for kind in (pa.string(), pa.float32()))]
    schema = pa.schema(list(zip(column_names(top_k), kinds, strict=True)))
    with pq.ParquetWriter(path, schema) as writer:
        group: list[pa.Table] = []
        for table in tables:
            group.append(table)
            if sum(map(len, group)) >= GROUP:
                writer.write_table(pa.concat_tables(group))
                group = []
        if group:
            writer.write_table(pa.concat_tables(group))


def _write_csv(path: str, tables: Iterator[pa.Table], top_k: int) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        _write_rows(file, tables, top_k)


def _write_rows(file: TextIO, tables: Iterator[pa.Table], top_k: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(column_names(top_k))
    for table in tables:
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
            writer.writerow([_text(value) for value in row])


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value
