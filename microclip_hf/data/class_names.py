"""Class names from a file: one a line, in one column of a CSV file, or in JSON."""

import csv
import os
import re
import unicodedata
import warnings
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
TITLES = {
    *("category", "categories", "class", "classes", "classname", "label", "labels", "name", "names"),
    *("species", "speciesname", "taxon", "taxa", "scientificname", "commonname", "englishname", "latinname"),
}
LINE_MARKS = {
    "the mark of a list": re.compile(r"[-*+•·]\s"),
    "quotes": re.compile(r"([\"'`]).*\1,?$"),
}
BRACKETS = re.compile(r"[\[\]{}()<>\"'`,;=|~_-]+")
SEPARATORS = {"tabs": r"\t", "semicolons": ";", "commas without a space": r",(?!\s)", "bars": r"\|"}
# What a name may hold, and what other kinds of lists have too.
DOUBTFUL = {"a comma, semicolon or bar": re.compile(r"[,;|]"), "a bracket": re.compile(r"[\[{]")}


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Class names in their order.

    Args:
        path (`str` or `os.PathLike`): text with one name a line, empty ones aside, in an encoding of
            [`~files.read_text`]; a CSV file of one column (`.csv`, `.tsv`); or JSON: a list of strings,
            `{"0": name, ...}` or `{name: 0, ...}`, by itself or as `id2label` or `names` of an object. In `.jsonl`
            each line is a string.

    What may be part of names, or of another kind of list (commas, brackets, numbers in front, a title), is kept, with
    one warning.

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
        trimmed = check_class_names([_trim(name) for name in names])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if names is lines:  # neither JSON nor CSV
        _judge_lines(path, trimmed)
    return trimmed


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
    titles = _titles(names)
    if titles:
        verb = "begins" if titles[0] == names[0] else "ends"
        raise ValueError(f"{path} {verb} with {titles[0]!r}, which reads like a column's title. Remove that line.")
    if names and all(";" in name for name in names):
        raise _not_a_list(path, f"semicolons in every line, as in {names[0]!r}")
    return names


def _refuse_separators(path: str | os.PathLike, names: Sequence[str]) -> None:
    separators = re.findall("[,;|\t]", names[0]) if len(names) == 1 else []
    if separators:
        raise _not_a_list(path, f"one line, with {separators[0]!r} in it")
    edges = [name for name in names if name.startswith(",") or name.endswith(",")]
    if edges:
        raise _not_a_list(path, f"commas at the ends of lines, as in {edges[0]!r}")
    for kind, pattern in SEPARATORS.items():
        found = [name for name in names if re.search(pattern, name)]
        if 2 * len(found) > len(names):
            raise _not_a_list(path, f"several columns, with {kind} between them, as in {found[0]!r}")


def _refuse_marks(path: str | os.PathLike, names: Sequence[str]) -> None:
    """What other kinds of lists have around their names, which would become part of them, and of every prompt."""
    brackets = [name for name in names if BRACKETS.fullmatch(name)]
    if brackets:
        raise _not_a_list(path, f"the line {brackets[0]!r}")
    for mark, pattern in LINE_MARKS.items():
        if names and all(pattern.match(name) for name in names):
            raise _not_a_list(path, f"{mark} in every line, as in {names[0]!r}")
    # The first line may be a title.
    for numbered in (names, names[1:]):
        if _are_numbers_of_lines(numbered):
            raise _not_a_list(path, f"a number before every name, as in {numbered[0]!r}")
    comments = [name for name in names if name.startswith("#")]
    if comments and len(comments) < len(names):
        raise _not_a_list(path, f"the comment {comments[0]!r}")


def _are_numbers_of_lines(names: Sequence[str]) -> bool:
    """Whether each of two or more names has its own number in front, which counts, in any order, or begins with 0."""
    prefixes = [match[1] for match in map(NUMBERED.match, names) if match]
    if len(names) < 2 or len(set(prefixes)) < len(names):
        return False
    is_padded = len(set(map(len, prefixes))) == 1 and any(len(prefix) > 1 and prefix[0] == "0" for prefix in prefixes)
    return is_padded or _is_count(sorted(map(int, prefixes)))


def _titles(names: Sequence[str]) -> list[str]:
    """Of the first and the last line those that read like the title of a column."""
    ends = dict.fromkeys((*names[:1], *names[-1:]))
    return [name for name in ends if re.sub("[ _]", "", re.split("[,;|]", name)[0]).casefold() in TITLES]


def _judge_lines(path: str | os.PathLike, names: Sequence[str]) -> None:
    """Refuse half a pair of brackets; one warning, with the first such line, where lines may be more than a name."""
    unpaired = [name for name in names if any(name.count(left) != name.count(right) for left, right in ("[]", "{}"))]
    if unpaired:
        raise _not_a_list(path, f"a bracket without its pair, in the line {unpaired[0]!r}")
    doubtful = {"what reads like a column's title": _titles(names)}
    if all(map(NUMBERED.match, names)):
        doubtful["a number in front"] = names
    doubtful |= {kind: list(filter(pattern.search, names)) for kind, pattern in DOUBTFUL.items()}
    for kind, found in doubtful.items():
        if found:
            warnings.warn(
                f"{path} has {kind} in {len(found)} of {len(names)} lines, the first of them {found[0]!r}. Each whole "
                f"line counts as one class name. Remove what isn't part of a name; names saved as JSON, {JSON_FORM}, "
                "are taken as they are.",
                stacklevel=3,
            )
            return


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
