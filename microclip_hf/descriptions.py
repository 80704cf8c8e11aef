"""Descriptions of classes in the format that CuPL made common: JSON, `{"class": ["sentence", ...]}`."""

import json
import os
from collections.abc import Sequence

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
            content = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f'{path} isn\'t a JSON file {{"class": ["sentence", ...]}}: {error}') from error
    matched = match_descriptions(class_names, content)
    return {name: own for name, own in zip(class_names, matched, strict=True) if own is not None}
