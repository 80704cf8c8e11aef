"""Rows that several processes compute, in files of a folder: written whole as they come, in order at the end.

Rows have a place: a shard of what is read, and a number counted from the shard's start. A part holds rows `first` to
`stop` of a shard, and its name says so. A mark says how many rows a shard has, once its end was seen.
"""

import contextlib
import json
import os
import re
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import UNFINISHED, write_whole


FACTS = "facts.json"
PART = re.compile(r"(\d+)-(\d+)-(\d+)\.parquet")
END = re.compile(r"(\d+)-(\d+)\.end")


@dataclass
class WrittenRows:
    """What a folder holds, by shard: the parts' `(first, stop)`, and where a shard ends, as far as that is known."""

    parts: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, int] = field(default_factory=dict)

    @classmethod
    def in_all(cls, folders: Sequence["WrittenRows"]) -> "WrittenRows":
        """The parts and ends that each of these has."""
        common = cls(ends=dict(set.intersection(*(set(one.ends.items()) for one in folders))))
        for shard in list(folders[0].parts):
            common.parts[shard] = sorted(set.intersection(*(set(one.parts[shard]) for one in folders)))
        return common

    @property
    def num_rows(self) -> int:
        """Rows that are there."""
        return sum(stop - first for shard in list(self.parts) for first, stop in self._covered(shard))

    def gaps(self, shard: int) -> Iterator[tuple[int, int | None]]:
        """Rows of a shard that are missing, `first` to `stop`, which is `None` where the end isn't known."""
        position = 0
        for first, stop in self._covered(shard):
            if first > position:
                yield position, first
            position = stop
        end = self.ends.get(shard)
        if end is None or position < end:
            yield position, end

    def _covered(self, shard: int) -> Iterator[tuple[int, int]]:
        """Rows of a shard that are there, once; processes that outlived a launch may have written some again."""
        position = 0
        for first, stop in sorted(self.parts[shard]):
            if stop > position:
                yield max(first, position), stop
                position = stop


class RowParts:
    """A folder of parts. `facts` are what rows depend on; a folder of other facts is refused."""

    def __init__(self, folder: str | os.PathLike, facts: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.facts = dict(facts)

    def create(self) -> None:
        """Begin, or go on with rows of the same facts; an error if they are of others, or the files aren't ours."""
        self.folder.mkdir(exist_ok=True)
        names = [path.name for path in self.folder.iterdir() if not path.name.startswith(UNFINISHED)]
        if not names:
            write_whole(self.folder / FACTS, json.dumps(self.facts, indent=1))
        elif FACTS not in names:
            raise ValueError(f"{self.folder} is in the way: it holds other files. Move it away.")
        self.check()

    def check(self) -> None:
        """An error that says what differs where the folder's rows are of other facts, or can't be seen from here."""
        try:
            facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.folder} can't be seen from this process; write to a folder that all machines share."
            ) from error
        for name in {**facts, **self.facts}:
            if facts.get(name) != self.facts.get(name):
                raise ValueError(
                    f"{self.folder} holds rows of an earlier run, whose {name.replace('_', ' ')} was "
                    f"{facts.get(name)!r} and is now {self.facts.get(name)!r}. Go on with what it began with, or "
                    "remove that folder to begin anew."
                )

    def find(self) -> WrittenRows:
        """What is there."""
        found = WrittenRows()
        for name in os.listdir(self.folder):
            if match := PART.fullmatch(name):
                shard, first, stop = map(int, match.groups())
                found.parts[shard].append((first, stop))
            elif match := END.fullmatch(name):
                shard, end = map(int, match.groups())
                if found.ends.setdefault(shard, end) != end:
                    raise ValueError(f"{self.folder} holds two ends of shard {shard}. What is read has changed.")
        return found

    def write(self, shard: int, first: int, rows: pa.Table) -> None:
        """Rows of a shard, from the row `first` on."""
        name = f"{shard:06d}-{first:012d}-{first + len(rows):012d}.parquet"
        with self.whole_file(self.folder / name) as incomplete:
            pq.write_table(rows, incomplete)

    @contextlib.contextmanager
    def whole_file(self, path: str | os.PathLike) -> Iterator[str]:
        """Where to write a file that gets its name once it is complete: in this folder, by a name of this process's
        own, since processes may outlive a launch that was killed and write the same.
        """
        incomplete = self.folder / f"{UNFINISHED}{socket.gethostname()}_{os.getpid()}"
        try:
            yield os.fspath(incomplete)
            incomplete.replace(path)
        finally:
            incomplete.unlink(missing_ok=True)

    def write_end(self, shard: int, end: int) -> None:
        """A shard has so many rows; any number of processes may say so."""
        (self.folder / f"{shard:06d}-{end:012d}.end").touch()

    def read(self, num_shards: int) -> Iterator[pa.Table]:
        """All rows in their order, part by part, each once; an error where one is missing."""
        found = self.find()
        for shard in range(num_shards):
            position = 0
            for first, stop in sorted(found.parts[shard]):
                if first > position:
                    break
                if stop > position:
                    rows = pq.read_table(self.folder / f"{shard:06d}-{first:012d}-{stop:012d}.parquet")
                    yield rows.slice(position - first)
                    position = stop
            if position != found.ends.get(shard):
                raise ValueError(
                    f"{self.folder} lacks the row {position} of shard {shard}. Give the same command again, which "
                    "computes what is missing."
                )

    def remove(self) -> None:
        """Remove the parts, and the folder unless there is something else in it."""
        for path in list(self.folder.iterdir()):
            name = path.name
            if name == FACTS or name.startswith(UNFINISHED) or PART.fullmatch(name) or END.fullmatch(name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
