"""Labels of all photos of a source in one file, by one process or many, which goes on where it was interrupted."""

import csv
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ..data.photo_sources import PhotoSource
from ..machine import MAX_WORKERS, num_workers
from ..row_parts import RowParts, WrittenRows
from .batches import PixelReader, RowBatch, RowBatches
from .predictions import Classifier, column_names


PARTS = ".parts"  # added to the output's name
PARQUET = ".parquet"
# Of work that a kill may cost, about, where a block takes longer.
MOST_SECONDS = 60
# How long processes wait for the slowest one.
PATIENCE = timedelta(days=30)
# Rows of a group of a Parquet file.
GROUP = 2**16


def join_processes(device: torch.device) -> PartialState:
    """The processes of this launch, which on CPUs find each other too."""
    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def print_aside(text: str) -> None:
    """A line on stderr, since stdout may be the table, that leaves a progress bar whole."""
    tqdm.write(text, file=sys.stderr)


@dataclass(frozen=True)
class LabelSettings:
    """How photos are read.

    Args:
        batch_size (`int`): photos classified at once.
        num_workers (`int`, *optional*): processes that read photos for each that classifies; 0 reads them in threads.
            Default: 0 on a CPU, else this process's share of the cores.
        exact_pixels (`bool`): decode large JPEGs whole (see [`PixelReader`]).
        tell (`Callable[[str], None]`): what is done with a sentence about a photo that can't be read.
        title (`str`): of the progress bar.
        keep_parts (`bool`): leave what was computed beside the output, until [`remove_parts`]; the same call then
            writes the output again without computing anything.
    """

    batch_size: int = 32
    num_workers: int | None = None
    exact_pixels: bool = False
    tell: Callable[[str], None] = print_aside
    title: str = "Photos"
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
    state = join_processes(classify.model.device)
    settings = settings or LabelSettings()
    facts = {"exact_pixels": str(settings.exact_pixels), **source.facts, **classify.facts()}
    parts = RowParts(f"{output}{PARTS}", facts)
    if state.is_main_process:
        parts.create()
    state.wait_for_everyone()
    parts.check()
    found = [parts.find() if state.is_main_process else None]
    written: WrittenRows = broadcast_object_list(found)[0]
    batches = _batches(classify, source, written, settings, (state.process_index, state.num_processes))
    # Readers share the rows by their number, so that all processes have as many.
    workers = min(gather_object([_num_workers(settings, classify.model.device)]))
    with _progress(source, written, state, settings.title) as bar:
        _write_parts(classify, _load(batches, workers, classify.model.device), parts, settings, bar)
    state.wait_for_everyone()
    if not state.is_main_process:
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
    batches = _batches(classify, source, WrittenRows(), settings, (0, 1))
    counts = LabelCounts()

    def tables() -> Iterator[pa.Table]:
        # Several workers would take turns.
        workers = min(1, _num_workers(settings, classify.model.device))
        for batch in _load(batches, workers, classify.model.device):
            if batch.names:
                yield _label(classify, batch, settings)
                bar.update(len(batch.names))

    with _progress(source, WrittenRows(), join_processes(classify.model.device), settings.title) as bar:
        _write_rows(file, counts.follow(tables()), classify.top_k)
    return counts


def _batches(
    classify: Classifier, source: PhotoSource, written: WrittenRows, settings: LabelSettings, place: tuple[int, int]
) -> RowBatches:
    reader = PixelReader(classify.model.image_processor, settings.exact_pixels)
    return RowBatches(source, written, reader, settings.batch_size, place)


def _num_workers(settings: LabelSettings, device: torch.device) -> int:
    if settings.num_workers is not None:
        return min(settings.num_workers, MAX_WORKERS)
    # On a CPU the model itself needs the cores.
    return 0 if device.type == "cpu" else num_workers()


def _load(batches: RowBatches, workers: int, device: torch.device) -> Iterable[RowBatch]:
    return batches.load(workers, pin_memory=device.type == "cuda")


def _progress(source: PhotoSource, written: WrittenRows, state: PartialState, title: str) -> tqdm:
    """The first process's bar, of its share of the photos."""
    total = None if source.total is None else source.total - written.num_rows
    share = total if total is None or state.num_processes == 1 else -(-total // state.num_processes)
    if state.num_processes > 1:
        title = f"{title} (of 1 in {state.num_processes} processes)"
    return tqdm(desc=title, total=share, unit="photo", disable=not state.is_main_process)


def _write_parts(
    classify: Classifier, batches: Iterable[RowBatch], parts: RowParts, settings: LabelSettings, bar: tqdm
) -> None:
    """Write blocks as they are complete, or what there is of them after `MOST_SECONDS`, and when interrupted; those of
    several workers come in turns. Batches are where they would be, whatever was written before.
    """
    blocks: dict[tuple[int, int, int], list[tuple[int, pa.Table]]] = {}

    def write(block: tuple[int, int, int]) -> None:
        firsts, tables = zip(*blocks.pop(block), strict=True)
        parts.write(block[0], firsts[0], pa.concat_tables(tables))

    last = time.monotonic()
    try:
        for batch in batches:
            block = (batch.shard, *batch.block)
            if batch.names:
                table = _label(classify, batch, settings)
                blocks.setdefault(block, []).append((batch.first, table))
                bar.update(len(batch.names))
            if time.monotonic() - last > MOST_SECONDS:
                for each in list(blocks):
                    write(each)
                last = time.monotonic()
            elif batch.is_last_of_block and block in blocks:
                write(block)
            if batch.end is not None:
                parts.write_end(batch.shard, batch.end)
    except KeyboardInterrupt as interrupt:
        for block in list(blocks):
            write(block)
        message = f"the labels so far are in {parts.folder}, and the same command goes on"
        raise KeyboardInterrupt(message) from interrupt


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
    if batch.pixel_values is not None:
        best = classify(batch.pixel_values)
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
