"""Photos to go through once, in order: files, or rows of a table that is read as it goes.

A source has shards, which are read one by one or by different processes; a row is counted from its shard's start.
"""

import contextlib
import hashlib
import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from .folders import match_files
from .image_columns import stored_images
from .parquet_stream import AT_ONCE
from .photo_files import photo_files
from .sources import BUILDERS, table_files
from .tables import is_saved, read_files, read_repository, read_saved, select_columns


DESCRIBED_AT_ONCE = 1000  # rows whose names and sizes are read


@dataclass(frozen=True)
class Photo:
    """A photo that isn't decoded yet."""

    name: str | None  # `None` where a table has none
    image: Any  # what `images.decode` takes

    @property
    def place(self) -> str:
        """How an error calls it."""
        path = self.image["path"] if isinstance(self.image, dict) else None
        return path or self.name or "A photo without a name"


class PhotoSource:
    """Photos in `num_shards` shards; `total` is their number, `None` where it isn't known, and `facts` say which."""

    num_shards: int
    total: int | None
    facts: dict[str, str]

    def open(self, shard: int, first: int) -> "ShardReader":
        """A shard, to be read from this row on; it must have the rows before."""
        raise NotImplementedError


class ShardReader:
    """The photos of a shard, of which `end` is the number once that is known."""

    end: int | None

    def take(self, first: int, stop: int) -> list[Photo]:
        """The rows `first` to `stop`, or to the end; calls go forward only."""
        raise NotImplementedError


class NumberedPhotos(PhotoSource, ShardReader):
    """The numbers of a data set's images, which are fetched by whoever reads them."""

    num_shards = 1

    def __init__(self, total: int) -> None:
        self.total = total
        self.end = total
        self.facts = {}

    def open(self, shard: int, first: int) -> "NumberedPhotos":
        """Itself."""
        return self

    def take(self, first: int, stop: int) -> list[Photo]:
        """As in the base class, in any order."""
        return [Photo(f"image {number}", number) for number in range(first, min(stop, self.end))]


class PhotoList(PhotoSource, ShardReader):
    """Photos that can be read anywhere: files, `{name: path}`, or a `Dataset` with an undecoded `image`."""

    num_shards = 1

    def __init__(self, photos: dict[str, Path] | Dataset, facts: dict[str, str] | None = None) -> None:
        self._dataset = photos if isinstance(photos, Dataset) else None
        self._names = [] if isinstance(photos, Dataset) else list(photos)
        self._paths = [] if isinstance(photos, Dataset) else list(map(str, photos.values()))
        self.total = len(photos)
        self.end = self.total
        if facts is None and self._dataset is None:
            facts = {"photos": f"{self.total} files, {digest(map(_describe_file, photos.items()))}"}
        self.facts = facts or {}

    def open(self, shard: int, first: int) -> "PhotoList":
        """Itself."""
        return self

    def take(self, first: int, stop: int) -> list[Photo]:
        """As in the base class, in any order."""
        if self._dataset is not None:
            return list(map(_photo, self._dataset[first : min(stop, self.total)]["image"]))
        rows = zip(self._names[first:stop], self._paths[first:stop], strict=True)
        return [Photo(name, {"path": path, "bytes": None}) for name, path in rows]


class PhotoStream(PhotoSource):
    """Photos of an `IterableDataset` with an undecoded `image`, in its own shards."""

    def __init__(
        self, stream: IterableDataset, facts: dict[str, str], total: int | None, files: Sequence[str] = ()
    ) -> None:
        self._stream = stream
        self._files = files
        self.num_shards = stream.num_shards
        self.total = total
        self.facts = facts

    def open(self, shard: int, first: int) -> "StreamReader":
        """As in the base class."""
        file = self._files[shard] if len(self._files) == self.num_shards else None
        return StreamReader(self._stream.shard(self.num_shards, shard), first, file)


class StreamReader(ShardReader):
    """A shard of a stream, whose end is known once it is reached."""

    def __init__(self, stream: IterableDataset, first: int, file: str | None) -> None:
        self.end = None
        # By `iter`, since a data loader's worker that loops over a stream gets what `datasets` deems its share.
        batches = (stream.skip(first) if first else stream).iter(AT_ONCE)
        images = (image for batch in batches for image in batch["image"])
        self._images = images if file is None else _name_errors(images, file)
        self._position = first

    def take(self, first: int, stop: int) -> list[Photo]:
        """As in the base class."""
        self._position += sum(1 for _ in itertools.islice(self._images, first - self._position))
        images = list(itertools.islice(self._images, stop - first))
        self._position += len(images)
        if self._position < stop:
            self.end = self._position
        return list(map(_photo, images))


def find_photos(sources: Sequence[str]) -> dict[str, Path]:
    """The photos, by name and in order, that one folder stands for, or any number of files and patterns.

    The folder is searched at any depth (see [`photo_files`]); names are relative to it. Files and patterns
    (`photos/*.jpg`, `photos/**/*.jpg`, see [`match_files`]) are taken whatever their ending. An error if there is
    nothing, a folder isn't alone, or one can't be listed.
    """
    if len(sources) == 1 and os.path.isdir(sources[0]):
        folder = sources[0]
        return {file.as_posix(): Path(folder, file) for file in photo_files(folder)}
    photos = {}
    for source in sources:
        if os.path.isdir(source):
            raise ValueError(f"{source} is a folder, and not the only source; pass one folder, or files alone.")
        matches = match_files(source)
        if not matches:
            raise ValueError(f"{source} is no file or folder here, and no file matches it as a pattern.")
        photos |= {path: Path(path) for path in matches}
    return photos


def open_photos(sources: Sequence[str], image_column: str | None = None) -> PhotoSource:
    """Photos of [`find_photos`], or tables of them: a folder, files or patterns of Parquet, WebDataset (`.tar`) or
    Arrow files, which are read as a stream, or a folder written by `save_to_disk`.

    Raises:
        ValueError: as in [`find_photos`], or if tables can't be read, hold no images, or are of several kinds.
    """
    if len(sources) == 1 and is_saved(sources[0]):
        dataset = select_columns(read_saved(sources[0], False), sources[0], image_column, None, False)
        facts = {"photos": _describe_cache(dataset), "image_column": str(image_column)}
        return PhotoList(_undecoded(dataset), facts)
    # Several patterns may match a file.
    files = list({os.path.realpath(file): file for source in sources for file in table_files(source)}.values())
    if not files:
        if image_column is not None:
            raise ValueError(f"Photos that are files have no column; leave `image_column` ({image_column}) out.")
        return PhotoList(find_photos(sources))
    kinds = {next(kind for ending, kind in BUILDERS.items() if file.endswith(ending)) for file in files}
    others = [source for source in sources if not table_files(source)]
    if len(kinds) > 1 or others:
        raise ValueError(f"Pass photos, or tables of one kind; got {', '.join([*others, *files][:4])}.")
    kind = kinds.pop()
    title = sources[0] if len(sources) == 1 else f"{sources[0]}, ..."
    stream = select_columns(read_files(title, kind, files, True, image_column), title, image_column, None, False)
    is_parquet = kind == "parquet"
    total = sum(pq.read_metadata(file).num_rows for file in files) if is_parquet else None
    facts = {"photos": f"{len(files)} {kind} files, {_digest_files(files)}", "image_column": str(image_column)}
    return PhotoStream(stream, facts, total, files)


def open_hub_photos(
    name: str, config: str | None, revision: str | None, split: str, image_column: str | None, streaming: bool
) -> PhotoSource:
    """Photos of a data set on the Hub, or of a copy of its repository here, downloaded first or read as a stream."""
    dataset = read_repository(name, config, split=split, revision=revision, streaming=streaming)
    dataset = select_columns(dataset, name, image_column, None, False)
    facts = {"photos": f"{name}, {config}, {revision}, {split}", "image_column": str(image_column)}
    if isinstance(dataset, Dataset):
        facts["rows"] = _describe_cache(dataset)
        return PhotoList(_undecoded(dataset), facts)
    splits = dataset.info.splits or {}
    total = splits[split].num_examples if split in splits else None
    return PhotoStream(dataset, facts, total or None)


def digest_images(dataset: Dataset) -> str:
    """How many images there are, and a digest of their sizes and of their names below what all have in common, where
    they are images as they are stored.
    """
    if not isinstance(dataset.features.get("image"), ImageFeature):
        return f"{len(dataset)} images"
    names, sizes = [], []
    for rows in stored_images(dataset).with_format("arrow").iter(DESCRIBED_AT_ONCE):
        names += pc.struct_field(rows["image"], "path").to_pylist()
        # Of contents only the lengths are read.
        sizes += pc.binary_length(pc.struct_field(rows["image"], "bytes")).to_pylist()
    known = [name for name in names if name]
    start = len(os.path.commonprefix(known))  # noqa: RUF071, by letters: names needn't be paths
    images = (
        f"{(name or '')[start:]} {_file_size(name) if size is None else size}"
        for name, size in zip(names, sizes, strict=True)
    )
    return f"{len(dataset)} images, {digest(images)}"


def digest(texts: Iterable[str]) -> str:
    """The beginning of a SHA-256 of texts, file names of any bytes among them."""
    content = hashlib.sha256()
    for text in texts:
        content.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return content.hexdigest()[:16]


def _digest_files(files: Iterable[str]) -> str:
    """By names and sizes, so that a folder can be moved."""
    return digest(f"{os.path.basename(file)} {os.path.getsize(file)}" for file in files)


def _describe_file(photo: tuple[str, Path]) -> str:
    """By name and size: cameras call the photos of each card the same."""
    name, path = photo
    size = _file_size(path)
    return name if size is None else f"{name} {size}"


def _file_size(path: str | os.PathLike | None) -> int | None:
    with contextlib.suppress(OSError, TypeError):
        return os.path.getsize(path)
    return None


def _describe_cache(dataset: Dataset) -> str:
    return f"{len(dataset)} rows, {_digest_files(file['filename'] for file in dataset.cache_files)}"


def _name_errors(images: Iterable[Any], file: str) -> Iterator[Any]:
    try:
        yield from images
    except (OSError, pa.ArrowException, tarfile.TarError) as error:
        raise ValueError(f"{file} can't be read to its end: {error}. Get it again, or leave it out.") from error


def _undecoded(dataset: Dataset) -> Dataset:
    return dataset.cast_column("image", ImageFeature(decode=False))


def _photo(image: Any) -> Photo:
    return Photo(image["path"] if isinstance(image, dict) else None, image)
