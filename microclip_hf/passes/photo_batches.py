"""Photos in batches, shared out among processes, read by threads or workers ahead of the model."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from transformers import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..data.photo_sources import Photo, PhotoSource, PhotoStream
from ..images import TORCH_FILTERS, UNREADABLE, as_tensor, cut_strip, decode, draft, resize_pixels, to_rgb
from ..machine import num_threads
from .row_parts import WrittenRows


# A drafted JPEG is at least so many times as large as what it is resized to. With 2, a model of small pictures changed
# its mind on 1 to 3 % of photos, with 3 on 1 %.
DRAFT_MARGIN = 3
# Torch resizes pictures that are at least so many times as large, as resizing others takes little time.
TORCH_MARGIN = 2
# Above this number of pixels Pillow is as fast as torch, and needs less memory.
MOST_PIXELS = 2**24
# Changes whenever pixels of the same photo do, so that no pass goes on with rows of others.
PREPARATION = "2"
# Rows that are written at once, or the least multiple of the batch size above.
BLOCK = 256
# Shard and row of a photo.
Place = tuple[int, int]
# What the model takes of an image, a tensor or a dictionary of such, or why it can't be read. It is called in threads.
Reader = Callable[[Any, Place], Any]


class PixelReader:
    """Prepares photos as a model's image processor does.

    Unless `exact`, large pictures are prepared faster: JPEGs are decoded at 1/2, 1/4 or 1/8 where they are then still
    `DRAFT_MARGIN` times as large as what the processor resizes them to, and torch resizes, which is seldom a level of
    255 off.
    """

    def __init__(self, processor: BaseImageProcessor, exact: bool = False) -> None:
        self.processor = processor
        self.exact = exact
        settings = processor.to_dict()
        sizes = {name: value for name, value in (settings.get("size") or {}).items() if isinstance(value, int)}
        self.size = max(sizes.values(), default=None)
        # Of transformers' own processor it is known what it does first, which is done faster here.
        is_known = type(processor) is CLIPImageProcessorPil and sizes.keys() == {"shortest_edge"}
        self.edge = sizes["shortest_edge"] if is_known and settings["do_resize"] else None

    def __call__(self, image: Any, place: Place | None = None) -> torch.Tensor | Exception:
        """Pixels `(num_channels, height, width)` of what [`decode`] takes, or why it can't be read."""
        try:
            with decode(image, lazy=True) as opened:
                if self.size is not None and not self.exact:
                    draft(opened, min(opened.size), DRAFT_MARGIN * self.size)
                pixels = self._resize(cut_strip(to_rgb(opened)))
        except UNREADABLE as error:
            return error
        return self.processor(pixels, return_tensors="pt")["pixel_values"][0]

    def _resize(self, image: Image.Image) -> Image.Image:
        """The picture as the processor resizes it, which then changes nothing more."""
        if self.edge is None:
            return image
        width, height = (int(self.edge * side / min(image.size)) for side in image.size)
        resample = self.processor.resample
        is_large = min(image.size) >= TORCH_MARGIN * self.edge and image.width * image.height <= MOST_PIXELS
        if self.exact or not is_large or resample not in TORCH_FILTERS:
            return image.resize((width, height), resample)
        return Image.fromarray(resize_pixels(as_tensor(image), (height, width), resample).permute(1, 2, 0).numpy())


class NumberReader:
    """Reads the images of a data set by their numbers, where only the data set itself can."""

    def __init__(self, dataset: Any, read: Reader) -> None:
        self.dataset = dataset
        self.read = read

    def __call__(self, number: int, place: Place) -> Any:
        """What `read` makes of the image."""
        try:
            image = self.dataset[number]["image"]
        except UNREADABLE as error:
            return error
        return self.read(image, place)


class RowBatch(NamedTuple):
    """Photos that follow each other in a shard, from the row `first` on, of a block that is written at once.

    `inputs` is what was read of the photos without a problem, collated, `None` where there is none; `end` is the
    shard's number of rows, once that is known, in a batch without photos.
    """

    shard: int
    block: tuple[int, int]
    first: int
    names: list[str | None]
    problems: list[str | None]
    inputs: Any
    is_last_of_block: bool
    end: int | None


class RawBatch(NamedTuple):
    """A [`RowBatch`] before its photos are read."""

    shard: int
    block: tuple[int, int]
    first: int
    photos: list[Photo]
    is_last_of_block: bool
    end: int | None

    def items(self) -> list[tuple[Any, Place]]:
        """What is to be read."""
        return [(photo.image, (self.shard, self.first + row)) for row, photo in enumerate(self.photos)]

    def finish(self, results: Sequence[Any]) -> RowBatch:
        """The batch with what was read of each photo."""
        readable = [item for item in results if not isinstance(item, Exception)]
        names = [photo.name for photo in self.photos]
        problems = [
            f"{photo.place} can't be read: {item}" if isinstance(item, Exception) else None
            for photo, item in zip(self.photos, results, strict=True)
        ]
        inputs = default_collate(readable) if readable else None
        return RowBatch(self.shard, self.block, self.first, names, problems, inputs, self.is_last_of_block, self.end)


class RowBatches(IterableDataset):
    """The batches that are missing in `written`, of this process's share, each process's workers sharing that.

    Every process has whole shards; what is left over, as a single one, is shared out in blocks.
    """

    def __init__(
        self,
        source: PhotoSource,
        written: WrittenRows,
        read: Reader,
        batch_size: int,
        process: tuple[int, int],
        in_threads: bool = True,
    ) -> None:
        self.source = source
        self.written = written
        self.read = read
        self.batch_size = batch_size
        self.block = batch_size * -(-BLOCK // batch_size)
        self.process = process  # number of this process, and of all
        self.in_threads = in_threads  # otherwise photos are read one by one, by whoever takes the batches

    def __iter__(self) -> Iterator[RowBatch]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        process, num_processes = self.process
        # Of the first blocks every process gets one.
        raw_batches = self._raw_batches(number * num_processes + process, num_processes * num_workers)
        if not self.in_threads:
            for raw in raw_batches:
                yield raw.finish([self.read(*item) for item in raw.items()])
            return
        read_ahead_by = num_threads(num_workers)
        for raw, results in read_ahead(raw_batches, RawBatch.items, lambda item: self.read(*item), read_ahead_by):
            yield raw.finish(results)

    def load(self, num_workers: int, pin_memory: bool) -> Iterable[RowBatch]:
        """The batches; `num_workers` processes prepare them, or with 0 threads of this one. Few photos come in blocks
        so small that each of these has one.
        """
        if self.source.total is not None:
            share = self.source.total // (self.process[1] * max(1, num_workers))
            self.block = min(self.block, self.batch_size * max(1, share // self.batch_size))
        if num_workers == 0:
            return self
        if isinstance(self.source, PhotoStream):  # a shard that workers share is read by each of them
            num_workers = min(num_workers, max(1, self.source.num_shards // self.process[1]))
        # A generator of its own, since a run's random numbers mustn't depend on such a pass.
        reading = {"num_workers": num_workers, "pin_memory": pin_memory, "generator": torch.Generator()}
        return DataLoader(self, None, collate_fn=_same, **reading)

    def _raw_batches(self, reader: int, num_readers: int) -> Iterator[RawBatch]:
        num_whole = self.source.num_shards - self.source.num_shards % num_readers
        for shard in range(self.source.num_shards):
            is_whole = shard < num_whole
            if not is_whole:
                yield from self._read_shard(shard, reader, num_readers)
            elif shard % num_readers == reader:
                yield from self._read_shard(shard, 0, 1)

    def _read_shard(self, shard: int, reader: int, num_readers: int) -> Iterator[RawBatch]:
        gaps = list(self.written.gaps(shard))
        if not gaps:
            return
        rows = self.source.open(shard, gaps[0][0])
        for first, stop in itertools.islice(self._blocks(gaps, rows.end), reader, None, num_readers):
            for start in range(first, stop, self.batch_size):
                photos = rows.take(start, min(start + self.batch_size, stop))
                is_last = start + self.batch_size >= stop or len(photos) < self.batch_size
                yield RawBatch(shard, (first, stop), start, photos, is_last, None)
                if is_last:
                    break
            if rows.end is not None and stop >= rows.end:
                break
        if rows.end is not None:
            yield RawBatch(shard, (rows.end, rows.end), rows.end, [], True, rows.end)

    def _blocks(self, gaps: list[tuple[int, int | None]], end: int | None) -> Iterator[tuple[int, int]]:
        """The missing rows in blocks, which go on for ever where the end isn't known."""
        for first, stop in gaps:
            stop = end if stop is None else stop
            starts = itertools.count(first, self.block) if stop is None else range(first, stop, self.block)
            for start in starts:
                yield start, start + self.block if stop is None else min(start + self.block, stop)


def read_ahead(
    batches: Iterator[Any], items: Callable[[Any], list[Any]], read: Callable[[Any], Any], num_threads: int
) -> Iterator[tuple[Any, list[Any]]]:
    """Each batch with what threads have read of its items, while the batch before was worked on."""
    with ThreadPoolExecutor(1) as taker, ThreadPoolExecutor(num_threads) as pool:

        def take() -> tuple[Any, list[Any]] | None:
            batch = next(batches, None)
            return None if batch is None else (batch, [pool.submit(read, item) for item in items(batch)])

        ahead = taker.submit(take)
        while (taken := ahead.result()) is not None:
            batch, futures = taken
            # Before this batch is waited for, so that the threads are busy meanwhile.
            ahead = taker.submit(take)
            yield batch, [future.result() for future in futures]


def _same(batch: RowBatch) -> RowBatch:
    return batch
