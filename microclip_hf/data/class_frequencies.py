"""How frequent the classes are, where their owner knows it: a file of classes and shares."""

import csv
import io
import math
import os
from pathlib import Path

from ..files import parse_json, read_text
from ..text_heads import abbreviate, contrast_spellings, name_positions, normalize_name


# What a class gets whose share is 0, relative to an equal share: its logarithm has to be finite in float32.
MIN_SHARE = 1e-30


def read_class_frequencies(path: str | os.PathLike, class_names: list[str]) -> list[float]:
    """The frequency of each class, in the order of the names; they sum to 1.

    The file is JSON, `{"class": share, ...}`, or CSV with lines `class,share`, perhaps after one that names the
    columns. Shares are numbers from 0 on, photos of each class as well as percents; their sum doesn't matter. A share
    of 0 makes a class as good as impossible.

    Raises:
        ValueError: if a class has no share, or two, or one that is no such number, or a name is no class.
    """
    text = read_text(path)
    positions = name_positions(class_names)
    rows = _read_json(path, text) if Path(path).suffix.lower() == ".json" else _read_csv(path, text, positions)
    shares: dict[int, float] = {}
    for name, share in rows:
        position = positions.get(normalize_name(name))
        if position is None:
            advice = contrast_spellings(name, class_names, "the class names")
            raise ValueError(f"{path} holds {name!r}, which is none of the {len(class_names)} classes.{advice}")
        if position in shares:
            raise ValueError(f"{path} holds {name!r} twice; leave one share a class.")
        shares[position] = share
    missing = [name for position, name in enumerate(class_names) if position not in shares]
    if missing:
        raise ValueError(f"{path} lacks {abbreviate(missing)}; give every class a share, 0 where it has no photos.")
    total = sum(shares.values())
    if not total > 0:
        raise ValueError(f"{path} holds no share above 0; write how frequent each class is.")
    floored = [max(shares[position] / total, MIN_SHARE / len(class_names)) for position in range(len(class_names))]
    return [share / sum(floored) for share in floored]


def check_frequencies(source: str) -> None:
    """An error unless `class_frequencies` is a word that it may be, or a file."""
    if source not in ("equal", "estimated") and not os.path.isfile(source):
        raise ValueError(
            f"class_frequencies is {source!r}, and there is no such file; pass 'equal', 'estimated', or a CSV or JSON "
            "file of classes and their shares."
        )


def _read_json(path: str | os.PathLike, text: str) -> list[tuple[str, float]]:
    content = parse_json(path, text)
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}; expected {{"class": share, ...}}.')
    return [(name, _read_share(path, name, share)) for name, share in content.items()]


def _read_csv(path: str | os.PathLike, text: str, positions: dict[str, int]) -> list[tuple[str, float]]:
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    for row in rows:
        if len(row) != 2:
            raise ValueError(
                f"{path} holds the line {','.join(row)!r}; expected two columns with a comma between, 'class,share'."
            )
    if rows and not _is_number(rows[0][1]) and normalize_name(rows[0][0]) not in positions:
        rows = rows[1:]
    return [(name, _read_share(path, name, share)) for name, share in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_share(path: str | os.PathLike, name: str, share: object) -> float:
    is_number = _is_number(share) if isinstance(share, str) else type(share) in (int, float)
    if not is_number or not 0 <= float(share) < math.inf:
        raise ValueError(f"{path} gives {name!r} the share {share!r}; expected a number, 0 or more.")
    return float(share)
