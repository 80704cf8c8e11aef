"""Numbers of every image in a file, computed in one pass: the multi-view prior's scores, or features."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..data.photo_sources import PhotoSource
from ..files import write_whole
from ..passes.photo_batches import Reader, RowBatch, RowBatches
from ..passes.row_parts import PART, RowParts, WrittenRows
from ..passes.row_pass import PassSettings, load_share, write_parts
from .saving import turns


COMPLETE_FILE = "complete.npy"
# Beside it, until all rows are there.
PARTS = "parts"
# What earlier versions left there instead.
EARLIER_FILE = "incomplete.npy"
# Rows that are looked through at once.
CHUNK = 65536

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ImagePass:
    """Images to go through once, and what is read of each."""

    source: PhotoSource
    read: Reader  # gives tensors by name
    note: Callable[[RowBatch], None]  # is told of each batch, in every process
    in_threads: bool = True  # whether several may read at once
    blank: Inputs | None = None  # of no image; with it every process computes at each step, whole batches always
    begin: Callable[[int], None] | None = None  # is told before how many rows are there already


class KeptRows:
    """Rows of `num_columns` numbers in a memory-mapped `.npy` file, by image index: in order of shards and their rows.

    What can't be read has NaN, and is tried again by the next pass. The file has its name once it is complete; until
    then rows lie in parts beside it, and a pass that was interrupted is gone on with. `facts` are what the numbers
    depend on; those of other facts are refused. Several processes may write the same rows with the same numbers, and
    any number may read.
    """

    def __init__(
        self, folder: str, num_columns: int, facts: dict[str, Any], dtype: type[np.floating] = np.float32
    ) -> None:
        self.folder = folder
        self.num_columns = num_columns
        self.dtype = np.dtype(dtype)
        self._facts = json.dumps(facts)
        self._facts_file = os.path.join(folder, "facts.json")
        self._file = os.path.join(folder, COMPLETE_FILE)
        self._earlier_file = os.path.join(folder, EARLIER_FILE)
        self._parts = RowParts(os.path.join(folder, PARTS), {"facts": self._facts})

    def exists(self) -> bool:
        """Whether the rows are complete; an error where they are of other facts."""
        if not os.path.exists(self._file):
            return False
        facts = self._read_facts()
        if facts != self._facts:
            raise ValueError(
                f"{self.folder} holds numbers of {facts}; this run has {self._facts}. Resume with what the run began "
                "with, or remove that folder to compute them anew."
            )
        return True

    @property
    def num_rows(self) -> int:
        """The images that there are, once the rows are complete."""
        return len(np.load(self._file, mmap_mode="r"))

    def read(self, index: int | slice) -> np.ndarray:
        """The row of one image, `(num_columns,)`, or those of several."""
        return np.array(np.load(self._file, mmap_mode="r")[index])

    def find_unreadable(self) -> Iterator[np.ndarray]:
        """The images that couldn't be read, some after others."""
        for start in range(0, self.num_rows, CHUNK):
            yield start + np.flatnonzero(np.isnan(np.load(self._file, mmap_mode="r")[start : start + CHUNK, 0]))

    def remove(self) -> None:
        """Forget the rows of an earlier run."""
        for file in (self._facts_file, self._file, self._earlier_file):
            _remove_file(file)
        self._remove_parts()

    def remove_others(self) -> None:
        """Forget rows of other facts."""
        if self._read_facts() != self._facts:
            self.remove()

    def fill(
        self,
        images: ImagePass,
        compute: Callable[[Inputs], torch.Tensor],
        accelerator: Accelerator,
        settings: PassSettings,
    ) -> None:
        """Write what is computed, `(B, num_columns)`, of batches that are shared out; every process must call it.

        Nothing is done where every disk has all rows, and none of NaN. Machines may have disks of their own: each
        writes all rows, and those that one of them lacks are computed again.

        Raises:
            OSError: if the disk has no room for the parts, and for the file that is made of them.
        """
        self.exists()  # an error in all processes at once
        for has_turn in turns(accelerator):
            if has_turn:
                self._begin(images.source, settings.batch_size)
        if all(gather_object([self.exists()])):
            if accelerator.is_local_main_process:
                self._remove_parts()  # of a run that was killed as it did so
            return
        is_writer = accelerator.is_local_main_process and not self.exists()
        found = gather_object([self._parts.find() if is_writer else None])
        written = WrittenRows.in_all([rows for rows in found if rows is not None])
        if images.begin is not None:
            images.begin(written.num_rows)
        own = _take_share(images, written, accelerator, settings)
        computed = self._compute_together(own, images, compute, accelerator, settings.batch_size)
        with _progress_bar(images.source, written, accelerator, settings) as bar:
            if is_writer:
                write_parts(computed, lambda batch: batch.inputs, self._parts, bar)
            else:
                for _ in computed:
                    pass
        for has_turn in turns(accelerator):
            if has_turn and not self.exists():
                self._join(images.source.num_shards)

    def _compute_together(
        self,
        own: Iterable[RowBatch],
        images: ImagePass,
        compute: Callable[[Inputs], torch.Tensor],
        accelerator: Accelerator,
        batch_size: int,
    ) -> Iterator[RowBatch]:
        """The batches of all processes, in each of them, with what was computed in place of what was read.

        They go in step, a batch of each at a time, until all have run out.
        """
        batches = iter(own)
        while True:
            batch = next(batches, None)
            inputs = None if batch is None else batch.inputs
            rows = None
            if inputs is not None or images.blank is not None:
                rows = _compute(compute, inputs, images.blank, batch_size, accelerator.device)
            done = None if batch is None else batch._replace(inputs=self._make_rows(batch, rows))
            together = [one for one in gather_object([done]) if one is not None]
            if not together:
                return
            for one in together:
                images.note(one)
                yield one

    def _begin(self, source: PhotoSource, batch_size: int) -> None:
        """A place to write to, unless all rows are there, and none of NaN; an error if the disk has no room."""
        if self.exists():
            if not any(map(len, self.find_unreadable())):
                return
            self._take_apart(source.num_shards, batch_size)
        os.makedirs(self.folder, exist_ok=True)
        if self._read_facts() != self._facts:
            self.remove()
            write_whole(self._facts_file, self._facts)
        _remove_file(self._earlier_file)
        self._parts.create()
        self._remove_unreadable()
        if source.total is not None:
            num_written = self._parts.find().num_rows
            self._check_room(source.total, 2 * source.total - num_written)

    def _take_apart(self, num_shards: int, batch_size: int) -> None:
        """Make parts of the file again, without the batches that hold NaN. Where there are several shards, nothing
        says which rows are of which, and all are read again.
        """
        self._remove_parts()
        if num_shards == 1:
            self._parts.create()
            num_rows = self.num_rows
            unreadable = np.concatenate(list(self.find_unreadable()))
            bad_batches = batch_size * np.unique(unreadable // batch_size)
            starts = [0, *(bad_batches + batch_size).tolist()]
            stops = [*bad_batches.tolist(), num_rows]
            self._check_room(num_rows, num_rows)
            for start, stop in zip(starts, stops, strict=True):
                for first in range(start, stop, CHUNK):
                    self._parts.write(0, first, self._to_table(self.read(slice(first, min(first + CHUNK, stop)))))
            self._parts.write_end(0, num_rows)
        os.remove(self._file)

    def _remove_unreadable(self) -> None:
        """Remove the parts that hold NaN, so that their blocks are read again."""
        for path in list(self._parts.folder.iterdir()):
            if PART.fullmatch(path.name) and any(map(self._holds_nan, _contents(pq.read_table(path)))):
                path.unlink(missing_ok=True)

    def _holds_nan(self, content: pa.Buffer) -> bool:
        return bool(np.isnan(np.frombuffer(content, self.dtype)[:: self.num_columns]).any())

    def _join(self, num_shards: int) -> None:
        """Make the file of the parts, and remove them."""
        num_rows = self._parts.find().num_rows
        self._check_room(num_rows, num_rows)
        # Written as any file, since on a full disk writing to a memory map would kill the process.
        with self._parts.whole_file(self._file) as incomplete, open(incomplete, "wb") as file:
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": (num_rows, self.num_columns)}
            np.lib.format.write_array_header_1_0(file, header)
            for table in self._parts.read(num_shards):
                for content in _contents(table):
                    file.write(content)
        self._remove_parts()

    def _remove_parts(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._parts.remove()

    def _check_room(self, num_images: int, num_rows: int) -> None:
        needed = self.dtype.itemsize * num_rows * self.num_columns
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The numbers of {num_images} images, {self.num_columns} each, need {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free. Make room on that disk."
            )

    def _make_rows(self, batch: RowBatch, computed: torch.Tensor | None) -> pa.Table:
        """A row for each image, of NaN where it can't be read."""
        rows = np.full((len(batch.names), self.num_columns), np.nan, self.dtype)
        is_readable = np.array([problem is None for problem in batch.problems], bool)
        if is_readable.any():
            rows[is_readable] = computed.float().cpu().numpy()
        return self._to_table(rows)

    def _to_table(self, rows: np.ndarray) -> pa.Table:
        kind = pa.binary(self.dtype.itemsize * self.num_columns)
        column = pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])
        return pa.table({"rows": column})

    def _read_facts(self) -> str | None:
        with contextlib.suppress(FileNotFoundError), open(self._facts_file, encoding="utf-8") as file:
            return file.read()
        return None


def _remove_file(file: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(file)


def _contents(table: pa.Table) -> Iterator[pa.Buffer]:
    """The bytes of rows, some after others."""
    for rows in table["rows"].chunks:
        width = rows.type.byte_width
        yield rows.buffers()[1].slice(rows.offset * width, len(rows) * width)


def _take_share(
    images: ImagePass, written: WrittenRows, accelerator: Accelerator, settings: PassSettings
) -> Iterable[RowBatch]:
    """The batches of one process."""
    process = (accelerator.process_index, accelerator.num_processes)
    batches = RowBatches(images.source, written, images.read, settings.batch_size, process, images.in_threads)
    return load_share(batches, settings, accelerator.device)


def _compute(
    compute: Callable[[Inputs], torch.Tensor],
    inputs: Inputs | None,
    blank: Inputs | None,
    batch_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Of the images alone, `(B, num_columns)`, where with `blank` ones the batch was made whole."""
    number = 0 if inputs is None else len(next(iter(inputs.values())))
    if blank is not None:
        added = {name: value.expand(batch_size - number, *value.shape) for name, value in blank.items()}
        inputs = added if inputs is None else {name: torch.cat([inputs[name], added[name]]) for name in inputs}
    return compute({name: value.to(device, non_blocking=True) for name, value in inputs.items()})[:number]


def _progress_bar(source: PhotoSource, written: WrittenRows, accelerator: Accelerator, settings: PassSettings) -> tqdm:
    """Of all images, in the first process."""
    is_shown = settings.progress and accelerator.is_main_process
    done = written.num_rows
    return tqdm(desc=settings.title, total=source.total, initial=done, unit="photo", disable=not is_shown)
