"""Descriptions of classes in the format that CuPL made common: JSON, `{"class": ["sentence", ...]}`."""

import json
import os
from collections.abc import Sequence
from typing import Any

from .text_heads import match_descriptions


def read_descriptions(path: str | os.PathLike, class_names: Sequence[str]) -> dict[str, list[str]]:
    """Read and check a descriptions file.

    Args:
        path (`str` or `os.PathLike`): a JSON file in UTF-8.
        class_names (`Sequence[str]`): the classes; keys match them whatever their case, `_` and `-`.

    Returns:
        `dict[str, list[str]]`: the sentences of the classes that have any, under the names in `class_names`.

    Raises:
        ValueError: if the file isn't JSON, or its contents don't fit (see `match_descriptions`).
        TypeError: if values aren't lists of strings.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            content = json.load(file, object_pairs_hook=_refuse_duplicates)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f'{path} isn\'t a JSON file {{"class": ["sentence", ...]}}: {error}') from error
    matched = match_descriptions(class_names, content)
    return {name: own for name, own in zip(class_names, matched, strict=True) if own is not None}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of equal keys, and the sentences of the others would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"A descriptions file has the key {max(keys, key=keys.count)!r} twice; merge its lists.")
    return content
