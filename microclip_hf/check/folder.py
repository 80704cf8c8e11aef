"""What a check keeps in its folder: the draw, what both models said, and the labels."""

import json
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import parse_json, read_text, write_whole
from ..prediction.labelling import has_parts, remove_parts
from ..text_heads import name_positions, normalize_name
from .labels import NONE_OF_THESE, UNKNOWN, add_files
from .tables import Table, copy_table, fingerprint, is_table, read_table


DRAW = "draw.json"
TO_LABEL = "to_label.csv"
PAGE = "label.html"
MODELS = ("clip", "adapted")  # also the names of their tables
NUM_CANDIDATES = 4  # the best and the second of two models


@dataclass(frozen=True)
class DrawRecord:
    """What `draw.json` holds.

    Args:
        photos (`str`): the folder, as an absolute path; files are relative to it.
        sources (`dict[str, str]`): where each model came from, by `MODELS`.
        fingerprints (`dict[str, str | None]`): of these sources, and of both tables by their files' names.
        order (`list[str]`): files in the order in which they are labelled; the first `num_drawn` are to be.
        strata (`list[int]`): the stratum of each, in this order.
        differs (`list[bool]`): of each stratum, whether the models differ on its photos.
        num_left_out (`int`): photos that can't be read.
    """

    photos: str
    sources: dict[str, str]
    fingerprints: dict[str, str | None]
    class_names: list[str]
    descriptions: dict[str, list[str]]
    seed: int
    order: list[str]
    strata: list[int]
    differs: list[bool]
    num_drawn: int
    num_left_out: int


@dataclass(frozen=True)
class Check:
    """A check's folder, read."""

    folder: Path
    record: DrawRecord
    tables: dict[str, Table]  # by `MODELS`

    @property
    def labels(self) -> Path:
        """The table that a person fills."""
        return self.folder / TO_LABEL

    @property
    def titles(self) -> dict[str, str]:
        """What the models are called, by `MODELS`."""
        clip = "CLIP with descriptions" if self.record.descriptions else "CLIP"
        return {"clip": clip, "adapted": "the adapted model"}

    @property
    def drawn(self) -> list[str]:
        """The files to label."""
        return self.record.order[: self.record.num_drawn]

    @property
    def differs(self) -> dict[str, bool]:
        """Of each photo whether the models differ on it."""
        record = self.record
        return {file: record.differs[stratum] for file, stratum in zip(record.order, record.strata, strict=True)}

    def candidates(self, file: str) -> list[str]:
        """The classes in question, in an order that tells nothing: what the models hold for best and second, and
        others at random, so that their number doesn't tell where the models differ.
        """
        names: dict[str, str] = {}
        for table in self.tables.values():
            for name in table[file].names[:2]:
                names.setdefault(normalize_name(name), name)
        rng = random.Random(f"{self.record.seed} {file}")
        others = [name for name in self.record.class_names if normalize_name(name) not in names]
        fillers = rng.sample(others, min(len(others), NUM_CANDIDATES - len(names)))
        shuffled = sorted([*names.values(), *fillers])
        rng.shuffle(shuffled)
        return shuffled

    def predicted(self, files: Sequence[str]) -> np.ndarray:
        """Class indices `(num_files, 2)`, of each model."""
        positions = name_positions(self.record.class_names)
        tables = self.tables.values()
        return np.array([[positions[normalize_name(table[file].label)] for table in tables] for file in files])


def check_new_folder(folder: str | os.PathLike) -> None:
    """Refuse a folder that holds a check, whose labels would be in danger, or tables of other origin, or is a file."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"`output_dir` {folder} is a file; pass a folder, new or not.")
    held = [name for name in (DRAW, TO_LABEL) if os.path.exists(os.path.join(folder, name))]
    # Beside those of a check that was interrupted lie the parts that they were made of.
    tables = [table_path(folder, name) for name in MODELS]
    held += [path.name for path in tables if path.exists() and not has_parts(os.fspath(path))]
    if held:
        advice = "Go on with it by --finish or --more, or" if DRAW in held else "Move it away, or"
        raise ValueError(
            f"`output_dir` {folder} already holds {', '.join(held)}, perhaps with labels. {advice} choose another "
            "folder."
        )


def write_check(folder: str | os.PathLike, record: DrawRecord, tables: Mapping[str, Table]) -> Check:
    """Write `to_label.csv`, copies of tables that were given, and last `draw.json`, which makes the folder a check."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in record.sources.items():
        path = table_path(folder, name)
        if is_table(source):
            copy_table(source, path)
        record.fingerprints[path.name] = fingerprint(path)
    check = Check(folder, record, dict(tables))
    add_files(check.labels, shuffled_batch(record, 0))
    write_record(check)
    for name in MODELS:
        remove_parts(os.fspath(table_path(folder, name)))
    return check


def table_path(folder: str | os.PathLike, name: str) -> Path:
    """Where a folder has what a model said, by its name in `MODELS`."""
    return Path(folder, f"{name}.csv")


def shuffled_batch(record: DrawRecord, start: int) -> list[str]:
    """The files drawn from number `start` on, in an order that says nothing of strata."""
    batch = record.order[start : record.num_drawn]
    random.Random(f"{record.seed} {start}").shuffle(batch)
    return batch


def write_record(check: Check) -> None:
    """Write `draw.json`."""
    write_whole(check.folder / DRAW, json.dumps(asdict(check.record), ensure_ascii=False) + "\n")


def read_check(folder: str | os.PathLike) -> Check:
    """Read a check's folder; one warning where a model isn't any more what it was.

    Raises:
        ValueError: if it is no such folder, or not as it was written.
    """
    folder = Path(folder)
    missing = [name for name in (DRAW, TO_LABEL, *(f"{name}.csv" for name in MODELS)) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}; pass the --output_dir of microclip check, with all that it wrote."
        )
    try:
        record = DrawRecord(**_read_json(folder / DRAW))
        files = list(zip(record.order, record.strata, strict=True))
        is_whole = len(files) == len(set(record.order)) and 0 < record.num_drawn <= len(files)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / DRAW} isn't as microclip check wrote it: {error}") from error
    tables = {name: table_path(folder, name) for name in MODELS}
    changed = [path.name for path in tables.values() if record.fingerprints.get(path.name) != fingerprint(path)]
    if changed or not is_whole:
        raise ValueError(
            f"{folder} isn't as it was when the photos were drawn: {', '.join(changed or [DRAW])} changed. The labels "
            f"in {TO_LABEL} are of that draw; take the files from a copy."
        )
    _warn_of_other_models(record)
    return Check(folder, record, {name: read_table(path) for name, path in tables.items()})


def _read_json(path: Path) -> dict[str, Any]:
    content = parse_json(path, read_text(path))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def is_another_model(record: DrawRecord, name: str) -> bool:
    """Whether a model, by its name in `MODELS`, is here and isn't what it was when the photos were drawn."""
    was, now = record.fingerprints.get(name), fingerprint(record.sources[name])
    return was is not None and now is not None and was != now


def _warn_of_other_models(record: DrawRecord) -> None:
    for name, source in record.sources.items():
        if is_another_model(record, name):
            warnings.warn(
                f"{source} isn't the model any more that it was when the photos were drawn. What follows is of that "
                "earlier one; for this one start another check, in another folder.",
                stacklevel=3,
            )


def check_special_names(class_names: Sequence[str]) -> None:
    """Refuse classes that are called like labels that name no class."""
    wrong = [name for name in class_names if normalize_name(name) in map(normalize_name, (UNKNOWN, NONE_OF_THESE))]
    if wrong:
        raise ValueError(f"A class is called {wrong[0]!r}, which stands for no class in {TO_LABEL}; rename the class.")
