"""Class names from a file: one a line, in one column of a CSV file, or in JSON."""

import csv
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import parse_json, read_text
from ..text_heads import abbreviate, check_class_names


JSON_FORM = '["class", ...]'
# Characters that can't be seen and mean nothing: zero-width spaces and joins of words, soft hyphens. Joiners of
# letters stay, which scripts from Persian to Hindi, and emoji, are spelt with.
INVISIBLE = str.maketrans("", "", "\u200b\u2060\ufeff\u00ad")
AROUND = " \xa0\u200e\u200f\u061c"  # spaces, and the marks of direction that are copied along
LOST = "\ufffd"
NUMBERED = re.compile(r"\(?(\d+)[\s.):,;_-]+\S")
TITLES = {"category", "categories", "class", "classes", "classname", "label", "labels", "name", "names"}
LINE_MARKS = {
    "the mark of a list": re.compile(r"[-*+•·]\s"),
    "quotes": re.compile(r"([\"'`]).*\1,?$"),
}
BRACKETS = re.compile(r"[\[\]{}()<>\"'`,;=|~_-]+")
SEPARATORS = {"tabs": r"\t", "semicolons": ";", "commas without a space": r",(?!\s)", "bars": r"\|"}


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Class names in their order.

    Args:
        path (`str` or `os.PathLike`): text with one name a line, empty ones aside, in an encoding of
            [`~files.read_text`]; a CSV file of one column (`.csv`, `.tsv`); or JSON: a list of strings,
            `{"0": name, ...}` or `{name: 0, ...}`, by itself or as `id2label` or `names` of an object. In `.jsonl`
            each line is a string.

    Raises:
        ValueError: if it holds something else (several columns, numbered lines, comments, control characters), or
            there are fewer than two names or duplicates.
    """
    text = read_text(path).translate(INVISIBLE)
    ending = Path(path).suffix.lower()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if ending == ".jsonl":
        names = _from_json(path, [parse_json(path, line, "with a string in each line") for line in lines])
    elif ending == ".json" or re.fullmatch(r"\[.*\]|\{.*\}", text.strip(), re.DOTALL):
        names = _from_json(path, parse_json(path, text, JSON_FORM))
    elif ending in (".csv", ".tsv"):
        names = _from_csv(path, lines, "," if ending == ".csv" else "\t")
        _refuse_marks(path, names)
    else:
        names = lines
        _refuse_separators(path, names)
        _refuse_marks(path, names)
    try:
        return check_class_names([_trim(name) for name in names])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_json(path: str | os.PathLike, content: Any) -> list[str]:
    if isinstance(content, dict):
        for key in ("id2label", "names"):
            if isinstance(content.get(key), (dict, list)):
                return _from_json(path, content[key])
        content = _ordered(content)
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(
            f'{path} holds JSON, but no list of class names; expected {JSON_FORM}, or {{"0": "class", ...}} with a '
            "number from 0 for each. Descriptions of classes are another file."
        )
    return content


def _ordered(content: dict[str, Any]) -> list[str] | None:
    """Names by their numbers, which count from 0 or 1; `None` where the object isn't of names and numbers."""
    if all(isinstance(value, str) and key.isdecimal() for key, value in content.items()):
        numbered = sorted((int(key), name) for key, name in content.items())
    elif all(type(value) is int for value in content.values()):
        numbered = sorted((number, name) for name, number in content.items())
    else:
        return None
    return [name for _, name in numbered] if _is_count([number for number, _ in numbered]) else None


def _is_count(numbers: list[int]) -> bool:
    """Whether they count up, from 0 or from 1."""
    return numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _from_csv(path: str | os.PathLike, lines: Sequence[str], delimiter: str) -> list[str]:
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} isn't a CSV file: {error}") from error
    for row in rows:
        if len(row) > 1:
            raise ValueError(f"{path} has several columns ({abbreviate(row)}); expected one. Save the names alone.")
    names = [row[0].strip() for row in rows if row[0].strip()]
    if names and re.sub("[ _]", "", names[0]).casefold() in TITLES:
        raise ValueError(f"{path} begins with {names[0]!r}, which reads like a column's title. Remove that line.")
    if names and all(";" in name for name in names):
        raise _not_a_list(path, f"semicolons in every line, as in {names[0]!r}")
    return names


def _refuse_separators(path: str | os.PathLike, names: Sequence[str]) -> None:
    separators = re.findall("[,;|\t]", names[0]) if len(names) == 1 else []
    if separators:
        raise _not_a_list(path, f"one line, with {separators[0]!r} in it")
    if len(names) > 1 and all(name.endswith(",") for name in names[:-1]):
        raise _not_a_list(path, f"commas at the ends of lines, as in {names[0]!r}")
    for kind, pattern in SEPARATORS.items():
        counts = {len(re.findall(pattern, name)) for name in names}
        if len(counts) == 1 and counts != {0}:
            raise _not_a_list(path, f"several columns, with {kind} between them, as in {names[0]!r}")


def _refuse_marks(path: str | os.PathLike, names: Sequence[str]) -> None:
    """What other kinds of lists have around their names, which would become part of them, and of every prompt."""
    brackets = [name for name in names if BRACKETS.fullmatch(name)]
    if brackets:
        raise _not_a_list(path, f"the line {brackets[0]!r}")
    for mark, pattern in LINE_MARKS.items():
        if names and all(pattern.match(name) for name in names):
            raise _not_a_list(path, f"{mark} in every line, as in {names[0]!r}")
    prefixes = [NUMBERED.match(name) for name in names]
    if len(names) > 1 and all(prefixes) and _is_count([int(prefix[1]) for prefix in prefixes]):
        raise _not_a_list(path, f"a number before every name, as in {names[0]!r}")
    comments = [name for name in names if name.startswith("#")]
    if comments and len(comments) < len(names):
        raise _not_a_list(path, f"the comment {comments[0]!r}")


def _not_a_list(path: str | os.PathLike, content: str) -> ValueError:
    return ValueError(
        f"{path} has {content}; expected one class name a line and nothing else. Remove what isn't part of a name. "
        f"What is can be kept by saving the names as JSON, {JSON_FORM}, which are taken as they are."
    )


def _trim(name: str) -> str:
    """A name without spaces and marks of direction around it; refuses what ends lines, or stands for lost signs."""
    for character in name:
        if character == LOST:
            raise ValueError(f"{name!r} holds U+FFFD, the sign for a lost character. Write that name anew.")
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            raise ValueError(
                f"{name!r} holds U+{ord(character):04X}, which ends or controls a line. Write that name anew."
            )
    return name.strip(AROUND)
