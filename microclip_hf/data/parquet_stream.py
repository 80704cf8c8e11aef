"""Parquet files as a stream, in memory that doesn't grow with a file.

The reader of `datasets` keeps what it has read of a file and decodes groups of rows ahead. This is a module of its own
since `datasets` patches the module of a builder, so that `open` takes addresses.
"""

import glob
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from .image_columns import PATHS, has_type


AT_ONCE = 16  # rows that are taken of a stream
BUFFER = 2**18  # bytes of each column that are read at once
READ_ERRORS = (OSError, ValueError, TypeError, pa.ArrowException)


def stream_parquet(paths: Sequence[str]) -> datasets.IterableDataset:
    """The files as shards. Columns are those of the first one, to whose types those of the others are cast.

    What is held of a file is at most three pages of each column. Pyarrow fills a page with 1,024 rows or more, unless
    the groups of rows are smaller.

    Raises:
        OSError, ValueError, pa.ArrowException: if the first file can't be read, or has types that `datasets` lacks.
        ValueError: while rows are read, with the file's name.
    """
    builder = _ParquetStream(data_files={"train": [glob.escape(path) for path in paths]})
    return builder.as_streaming_dataset("train")


def check_column(paths: Sequence[str], name: str, features: datasets.Features) -> None:
    """An error if a file lacks a column of images that the first one has, or has something else in it."""
    for path in paths[1:]:
        schema = pq.read_schema(path)
        if name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}, which {paths[0]} has. Leave one of them out.")
        if not _fits(schema.empty_table().select([name]), name, features[name]):
            raise ValueError(
                f"The column {name!r} of {path} is of the type {schema.field(name).type}, and that of {paths[0]} is "
                f"{features[name]}. Leave one of them out."
            )


def _fits(column: pa.Table, name: str, feature: Any) -> bool:
    """Whether a column can be cast to a feature, and both hold paths or neither does."""
    try:
        table_cast(column, datasets.Features({name: feature}).arrow_schema)
        found = datasets.Features.from_arrow_schema(column.schema)[name]
    except READ_ERRORS:
        return False
    return has_type(found, PATHS) == has_type(feature, PATHS)


class _ParquetStream(datasets.ArrowBasedBuilder):
    """Methods are those that `datasets` asks of a builder."""

    def _info(self) -> datasets.DatasetInfo:
        first = self.config.data_files["train"][0]
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(pq.read_schema(first)))

    def _split_generators(self, dl_manager: datasets.StreamingDownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train", {"paths": list(self.config.data_files["train"])})]

    def _generate_tables(self, paths: list[str]) -> Iterator[tuple[str, pa.Table]]:
        for path in paths:
            for number, rows in enumerate(_read(path, self.info.features)):
                yield f"{path}_{number}", rows


def _read(path: str, features: datasets.Features) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
            columns = [name for name in file.schema_arrow.names if name in features]
            for rows in file.iter_batches(AT_ONCE, columns=columns, use_threads=False):
                # Columns may come along whose names begin like one of these; what is lacking becomes empty.
                yield table_cast(pa.Table.from_batches([rows]).select(columns), features.arrow_schema)
    except READ_ERRORS as error:
        raise ValueError(f"{path} can't be read: {error}") from error
