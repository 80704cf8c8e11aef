"""Parquet files as a stream, in memory that doesn't grow with a file.

The reader of `datasets` keeps what it has read of a file and decodes groups of rows ahead. This is a module of its own
since `datasets` patches the module of a builder, so that `open` takes addresses.
"""

import glob
from collections.abc import Iterator, Sequence

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast


AT_ONCE = 16  # rows that are taken of a stream
BUFFER = 2**18  # bytes of each column that are read at once
READ_ERRORS = (OSError, ValueError, TypeError, pa.ArrowException)


def stream_parquet(paths: Sequence[str]) -> datasets.IterableDataset:
    """The files as shards; columns are those of the first one, to which the types of the others are cast.

    What is held of a file is at most three pages of each column. Pyarrow fills a page with 1,024 rows or more, unless
    the groups of rows are smaller.

    Raises:
        OSError, ValueError, pa.ArrowException: if the first file can't be read, or has types that `datasets` lacks.
        ValueError: while rows are read, with the file's name.
    """
    builder = _ParquetStream(data_files={"train": [glob.escape(path) for path in paths]})
    return builder.as_streaming_dataset("train")


class _ParquetStream(datasets.ArrowBasedBuilder):
    """Methods are those that `datasets` asks of a builder."""

    def _info(self) -> datasets.DatasetInfo:
        first = self.config.data_files["train"][0]
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(pq.read_schema(first)))

    def _split_generators(self, dl_manager: datasets.StreamingDownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train", {"paths": list(self.config.data_files["train"])})]

    def _generate_tables(self, paths: list[str]) -> Iterator[tuple[str, pa.Table]]:
        for path in paths:
            for number, rows in enumerate(_read(path, self.info.features.arrow_schema)):
                yield f"{path}_{number}", rows


def _read(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
            for rows in file.iter_batches(AT_ONCE, use_threads=False):
                yield table_cast(pa.Table.from_batches([rows]), schema)
    except READ_ERRORS as error:
        raise ValueError(f"{path} can't be read: {error}") from error
